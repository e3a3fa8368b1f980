"""Where the versions of an advisor's adapter lie, and which of them is in use.

    models/qwen3-vl-4b-lora-ansel       version 1 (adapter_config.json, two weight files, training_args.json)
    models/qwen3-vl-4b-lora-ansel-v2    version 2
    models/ansel/deployed.json          the record: which of them is in use

Training names its folder by these rules, promotion writes the record, evaluation and the service read it. Paths in a
record are relative to the record's own folder, so it means the same from every working directory and after the whole
of models/ was moved. Needs the standard library alone.
"""

import hashlib
from pathlib import Path

from .errors import LoraError
from .files import read_json
from .names import PREFIX, adapter_name, is_set_aside, parse_name

CONFIG, PEFT_WEIGHTS, MLX_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"
ARGS = "training_args.json"  # training writes it last: a folder that has it is finished
RECORD = "deployed.json"
SCHEMA_VERSION = 1
NO_VERSION = {"version": None, "adapter": None, "sha256": {}, "base_fingerprint": None, "report": None}


def version_folder(models: Path, advisor: str, number: int) -> Path:
    """Return where version ``number`` (from 1) of an advisor's adapter lies."""
    return models / adapter_name(advisor, number)


def parse_folder(folder: Path) -> tuple[str | None, int]:
    """Return (advisor, version number) of an adapter folder by its name, (None, 1) for a name of another form."""
    name = Path(folder).resolve().name
    return parse_name(name) if "lora-" in name and not is_set_aside(name) else (None, 1)


def find_versions(models: Path, advisor: str) -> dict[int, Path]:
    """Return {number: folder} of the finished versions, oldest first."""
    found = {}
    for folder in models.glob(f"{PREFIX}{advisor}*"):
        name, number = parse_folder(folder)
        # the name must be the version's own: an advisor "ansel-two" is another, and "ansel-v02" is no name of ours
        if name == advisor and folder == version_folder(models, advisor, number) and (folder / ARGS).is_file():
            found[number] = folder
    return dict(sorted(found.items()))


def training_args(folder: Path) -> dict:
    """Return what training recorded beside an adapter; {} where there is no record. LoraError for a damaged one."""
    return read_json(folder / ARGS) if (folder / ARGS).is_file() else {}


def adapter_hashes(folder: Path) -> dict[str, str]:
    """Return {file: SHA-256 in hex} of the files that make an adapter what it is."""
    found = {}
    for name in (CONFIG, PEFT_WEIGHTS, MLX_WEIGHTS):
        if (folder / name).is_file():
            with open(folder / name, "rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def record_path(models: Path, advisor: str) -> Path:
    """Return the record that says which version of an advisor's adapter is in use."""
    return models / advisor / RECORD


def read_record(path: Path) -> dict | None:
    """Read deployed.json; None when no version was ever put in use. LoraError for a damaged one."""
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        if record.get("schema_version") != SCHEMA_VERSION:
            raise LoraError(
                f"{path}: schema {str(record.get('schema_version'))[:20]}, this program reads {SCHEMA_VERSION}"
            )
        if wrong := _wrong(record):
            raise LoraError(f"{path}: {', '.join(wrong)} missing or of the wrong kind")
    except LoraError as error:
        raise LoraError(f"{error}; restore the file, or delete it and promote a version again") from error
    return NO_VERSION | {"promoted_at": "", "history": []} | record


def _wrong(record: dict) -> list[str]:
    """Return the fields of a record that are not what promotion writes; its history holds records like itself."""
    history, back = record.get("history", []), record.get("rolled_back", {})
    needed = {"history"} if record.get("adapter") is not None else set()
    entries = history if isinstance(history, list) else [None]
    whole = all(isinstance(entry, dict) and "adapter" in entry and not _wrong_here(entry) for entry in entries)
    whole = whole and needed <= record.keys()
    wrong = _wrong_here(record) + ([] if whole else ["history"])
    return wrong + ([] if isinstance(back, dict) and isinstance(back.get("version"), str | None) else ["rolled_back"])


def _wrong_here(record: dict) -> list[str]:
    texts = ("version", "adapter", "report", "report_sha256", "rule", "verdict", "promoted_at", "promoted_by")
    wrong = [name for name in texts if not isinstance(record.get(name), str | None)]
    hashes, in_use = record.get("sha256"), record.get("adapter") is not None
    if in_use and record.get("version") is None:
        wrong.append("version")
    if not isinstance(hashes, dict if in_use else dict | None) or not all(
        isinstance(v, str) for v in (hashes or {}).values()
    ):
        wrong.append("sha256")
    return wrong


def deployed_folder(path: Path) -> Path | None:
    """Return the folder of the adapter in use by a record, None when there is none; LoraError when it has changed."""
    record = read_record(path)
    if record is None or record["adapter"] is None:
        return None
    folder = path.parent / record["adapter"]
    check_unchanged(folder, record["sha256"], f"{path} says that {record['version']} is in use, but")
    return folder


def check_unchanged(folder: Path, hashes: dict, opening: str) -> None:
    """LoraError, beginning with ``opening``, when an adapter's files are not those that were promoted."""
    found = adapter_hashes(folder) if folder.is_dir() else {}
    changed = [name for name, sha in hashes.items() if found.get(name) != sha]
    if changed or not hashes:
        raise LoraError(f"{opening} {folder} has changed or is gone ({', '.join(changed)}); restore it from a copy")
