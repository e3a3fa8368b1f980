"""`install`: put our lines into a service file and this folder beside it, show what would be done, or take both out."""

import ast
import difflib
import os
import re
import shutil
import tempfile
from pathlib import Path

from .errors import LoraError
from .files import write_file
from .installer import Installer
from .source_file import BY_HAND, inserted, uninstalled

BACKUP = ".before_lora"
PACKAGE = Path(__file__).resolve().parent


def install(service: Path, check: bool, uninstall: bool, database: str | None = None) -> None:
    """Insert our lines, say what would be inserted (``check``), or take them out again (``uninstall``).

    ``database`` names the jobs' database: an expression of the service, or a path.
    """
    if not service.is_file():
        raise LoraError(f"{service}: no such file")
    path = service.resolve()
    raw = path.read_bytes()
    have = inserted(raw, service)
    if not check:
        for place in (path, path.parent):
            if not os.access(place, os.W_OK) or not place.stat().st_mode & 0o222:
                raise LoraError(f"{place}: read-only; nothing was changed")
    if uninstall:
        _uninstall(service, raw, bool(have), check)
        return
    installer = Installer(raw, service, _expression(database))
    new = raw if have >= set(BY_HAND) else installer.plan()
    if new == raw:  # a service needs fewer lines where modules of its own load the model and ask it
        if not check and _place_package(path.parent):
            print(f"{service}: installed already; lora_patch/ beside it brought up to date")
        else:
            print(f"{service}: installed already, nothing to do")
        return
    lines = sum(map(len, installer.placed.values()))
    if check:
        print(
            f"{service}: {'partly' if have else 'not'} installed; {lines} places were found and understood, "
            "these lines would be added:\n"
        )
    else:
        backup = path.with_name(path.name + BACKUP)
        if not have or not backup.exists():  # without our lines, as a partly patched service was before them
            write_file(backup, uninstalled(raw, service) if have else raw)
        _place_package(path.parent)
        write_file(path, new)
        print(f"{service}: {lines} lines inserted; as it was: {backup.name}\n")
    print(_diff(raw, new, path.name), end="")
    for note in installer.notes:
        print(f"note: {note}")
    if re.search(rb"INSERT\s+(OR\s+\w+\s+)?INTO\s+jobs\s+VALUES", raw, re.I):
        print("note: INSERT INTO jobs without a list of columns fails once the table has five more; name the columns")


def _expression(database: str | None) -> str | None:
    """Return what --db names as an expression: a path that is there as a text, else as it stands."""
    if database is None:
        return None
    is_path = "/" in database or Path(database).is_file() or re.search(r"\.(db|sqlite3?)$", database)
    try:
        ast.parse(database, mode="eval")
    except SyntaxError:
        is_path = True
    return repr(database) if is_path else database


def _uninstall(service: Path, raw: bytes, have: bool, check: bool) -> None:
    if not have:
        print(f"{service}: not installed, nothing to do")
        return
    path = service.resolve()
    backup = path.with_name(path.name + BACKUP)
    old = uninstalled(raw, service)
    compile(old, str(path), "exec")
    as_before = backup.is_file() and backup.read_bytes() == old
    if check:
        restored = ", which gives back the file as it was" if as_before else ""
        print(f"{service}: our lines would be taken out{restored}")
        return
    folder, single = path.with_name("lora_patch"), path.with_name("lora_patch.py")
    write_file(path, old)
    if as_before:
        backup.unlink()
    left = ""
    if _is_current(folder):
        shutil.rmtree(folder)
    elif (folder / "hooks.py").is_file():
        left = f"; {folder} is of another version of the package and stays: remove it by hand"
    if _is_single_file(single):
        single.unlink()
    kept = "byte for byte as it was" if as_before else f"lines taken out, your later changes kept ({backup.name} stays)"
    print(f"{service}: {kept}{left}")


# -- the folder beside the service ------------------------------------------------------------------------------------


def _sources(folder: Path) -> dict[str, bytes]:
    """Return the package's files, without Python's caches."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _is_current(folder: Path) -> bool:
    return folder.is_dir() and _sources(folder) == _sources(PACKAGE)


def _is_single_file(path: Path) -> bool:
    """Tell whether this is the one file that the package was in earlier versions."""
    return path.is_file() and b"Serve LoRA adapters from ai_advisor_service.py" in path.read_bytes()[:200]


def _place_package(parent: Path) -> bool:
    """Put the package beside the service, as a whole; return whether there was anything to do."""
    folder, single = parent / "lora_patch", parent / "lora_patch.py"
    if _is_current(folder) and not single.exists():
        return False
    draft = Path(tempfile.mkdtemp(dir=parent, prefix=".lora_patch."))
    try:
        for name, content in _sources(PACKAGE).items():
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_bytes(content)
        draft.chmod(0o755)
        for old, ours in ((folder, (folder / "hooks.py").is_file()), (single, _is_single_file(single))):
            if old.exists() and not ours:
                old.rename(_free(old))
        if folder.exists():
            (draft / "__pycache__").mkdir()  # a place that nothing reads, to move what is replaced out of the way
            folder.rename(draft / "__pycache__" / "replaced")
        draft.rename(folder)
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)
        single.unlink(missing_ok=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return True


def _free(path: Path) -> Path:
    """Return a free name to move something to that is not ours; earlier backups stay."""
    names = (path.with_name(f"{path.name}{BACKUP}{number or ''}") for number in range(1000))
    return next(name for name in names if not name.exists())


def _diff(before: bytes, after: bytes, name: str) -> str:
    sides = [raw.decode("utf-8", "replace").splitlines(keepends=True) for raw in (before, after)]
    return "".join(difflib.unified_diff(*sides, f"a/{name}", f"b/{name}")).replace("\r\n", "\n")
