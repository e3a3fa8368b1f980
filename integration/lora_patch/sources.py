"""Which adapters are to be served: what --lora_path, --model_config and deployed.json name."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from .arms import REQUEST_MODES
from .errors import LoraError, one_line
from .files import read_json
from .names import is_advisor, is_set_aside, parse_name
from .versions import RECORD, read_record

WEIGHTS = ("adapters.safetensors", "adapter_model.safetensors", "weights.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.npz", "*.npy")

EVERYONE = "*"  # in place of an advisor: an adapter that answers for all


@dataclass(frozen=True)
class Source:
    """Where an adapter comes from: folders with their weights, the version's name, and the hashes it must have."""

    parts: tuple  # ((Path, float), ...)
    version: str
    sha256: tuple = ()  # ((file name, hex), ...)

    def __post_init__(self):
        # it goes into a response header
        object.__setattr__(self, "version", re.sub(r"[^ -~]", "?", self.version)[:80])

    @property
    def path(self) -> str:
        if len(self.parts) == 1 and self.parts[0][1] == 1.0:
            return str(self.parts[0][0])
        return ",".join(f"{folder}:{weight:g}" for folder, weight in self.parts)


def adapter_in(folder: Path) -> Source:
    """Return the source of one adapter folder, whatever its name."""
    return Source(((Path(folder), 1.0),), f"v{parse_name(Path(folder).name)[1]}")


def find_sources(lora_path: str | None, model_config: str | None) -> tuple[dict[str, Source], str | None]:
    """Return ({advisor or "*": Source}, mode that an active model implies or None); reads names, no weights."""
    if lora_path:
        return _parse_list(lora_path), None
    if model_config:
        return _from_config(Path(model_config))
    return {}, None


def _parse_list(text: str) -> dict[str, Source]:
    """Parse ``FOLDER``, ``a:0.7,b:0.3`` and ``ansel=FOLDER,weston=a:0.5,b:0.5`` (an item without = joins the last)."""
    groups, advisor = {}, EVERYONE
    for item in filter(None, (piece.strip() for piece in text.split(","))):
        match = re.match(r"([^=/]+)=(.+)", item)
        if match and is_advisor(match[1]) and not Path(item).exists():
            advisor, item = match[1].lower(), match[2]
            if advisor in groups:
                raise LoraError(f"--lora_path: {advisor} is named twice")
        groups.setdefault(advisor, []).append(item)
    if not groups:
        raise LoraError("--lora_path: empty")
    found = {}
    for advisor, items in groups.items():
        if len(items) == 1 and not _weighted(items[0])[1]:
            found.update(_from_folder(Path(items[0]), advisor))
            continue
        parts, names = [], []
        for item in items:
            path, weight = _weighted(item)
            if weight is None:
                raise LoraError(f"--lora_path: {item} has no weight; combine as a:0.7,b:0.3")
            sources = _from_folder(Path(path), advisor)
            if len(sources) != 1:
                raise LoraError(f"--lora_path: {path} is not one adapter; name the folder of each to combine")
            source = next(iter(sources.values()))
            parts.extend((folder, own * weight) for folder, own in source.parts)
            names.append(f"{Path(path).name}:{weight:g}")
        found[advisor] = Source(tuple(parts), "+".join(names))
    return found


def _weighted(item: str) -> tuple[str, float | None]:
    match = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+))", item)
    return (match[1], float(match[2])) if match and not Path(item).exists() else (item, None)


def _is_adapter(folder: Path) -> bool:
    return any((folder / name).exists() for name in (*WEIGHTS, "adapter_config.json"))


def _is_whole(folder: Path) -> bool:
    """Tell whether a folder holds a finished adapter: the config is what training writes last."""
    return (folder / "adapter_config.json").is_file() and any((folder / name).is_file() for name in WEIGHTS)


def _from_folder(folder: Path, advisor: str) -> dict[str, Source]:
    """Find what a path names: one adapter, a deployed record, or a folder of versions (of several advisors)."""
    folder = folder.expanduser()
    if not folder.exists() and not folder.is_absolute() and (beside := Path(sys.argv[0]).parent / folder).exists():
        folder = beside  # a service started from elsewhere: beside its own file
    if folder.is_file() and folder.name == RECORD:
        return _from_record(folder)
    if folder.is_file():
        raise LoraError(f"{folder}: is a file; name the adapter's folder")
    if not folder.is_dir():
        raise LoraError(f"{folder}: no such adapter folder")
    if (folder / RECORD).is_file():
        return _from_record(folder / RECORD)
    if _is_adapter(folder):
        name, number = parse_name(folder.name)
        plain = name == folder.name and "lora" not in name
        return {advisor: Source(((folder, 1.0),), folder.name if plain else f"v{number}")}
    records = sorted(folder.glob(f"*/{RECORD}"))
    if not records and not unpromoted(folder):
        raise LoraError(f"{folder}: neither an adapter nor a folder of adapters (no adapter_config.json in it)")
    return {name: source for record in records for name, source in _from_record(record).items()}


def unpromoted(folder: Path) -> list[str]:
    """Return the advisors whose adapters are in a folder without a record of the version in use.

    Such a version may have failed its evaluation: it is served only where its own folder is named.
    """
    found = set()
    for child in folder.iterdir() if folder.is_dir() else ():
        if is_set_aside(child.name) or (folder / parse_name(child.name)[0] / RECORD).is_file():
            continue
        if _is_whole(child):
            found.add(folder.name if re.fullmatch(r"v\d+", child.name) else parse_name(child.name)[0])
        elif child.is_dir() and any(_is_whole(version) for version in child.iterdir()):  # weston/v1, weston/v2
            found.add(child.name)
    return sorted(found)


def _from_record(path: Path) -> dict[str, Source]:
    """Read models/ADVISOR/deployed.json; a record without an adapter (all rolled back) gives nothing."""
    record = read_record(path)
    advisor = str(record.get("advisor") or path.resolve().parent.name).lower()
    if record.get("adapter") is None:
        return {}
    root = path.resolve().parent.parent  # versions lie beside the record's folder: models/ADVISOR/deployed.json
    folder = _inside(root, path.resolve().parent / record["adapter"], path)
    return {advisor: Source(((folder, 1.0),), record["version"], tuple(sorted(record["sha256"].items())))}


def _from_config(path: Path) -> tuple[dict[str, Source], str | None]:
    """Read model_config.json ({"models": {name: {"lora_path": ...}}, "active_model": name}) or a deployed.json.

    Also its later form: {"models": {name: {"model_id": ..., "adapter": ...}}, "defaults": {"model_preset": name}}.
    """
    config = read_json(path)
    if "models" not in config and "adapter" in config:
        return _from_record(path), "fine_tuned"
    models, active = config.get("models"), config.get("active_model")
    defaults, named = config.get("defaults"), "active_model"
    if active is None and isinstance(defaults, dict):  # the later form of the service's family
        active, named = defaults.get("model_preset"), "defaults.model_preset"
    if isinstance(models, list):
        models = {str(model.get("name")): model for model in models if isinstance(model, dict)}
    if not isinstance(models, dict) or not models:
        raise LoraError(f'{path}: "models" must name at least one model')
    if not isinstance(active, str) or active not in models:
        raise LoraError(f"{path}: {named} {str(active)[:60]!r} is none of {', '.join(map(str, models))[:200]}")
    model = models[active]
    model = model if isinstance(model, dict) else {"lora_path": model}
    lora_path = next((model[key] for key in ("lora_path", "adapter_path", "adapter", "lora") if model.get(key)), None)
    if lora_path is None:
        return {}, "base"
    if not isinstance(lora_path, str):
        raise LoraError(f"{path}: lora_path of {active} must be text")
    here = path.resolve().parent
    root = here.parent if here.name == "config" else here  # config/model_config.json belongs to the folder above
    pieces = []
    for piece in lora_path.split(","):
        advisor, equals, rest = piece.rpartition("=")
        name, weight = _weighted(rest.strip())
        folder = _inside(root, root / name, path)
        pieces.append(f"{advisor}{equals}{folder}" + ("" if weight is None else f":{weight:g}"))
    found = _parse_list(",".join(pieces))
    if isinstance(model.get("advisor"), str) and EVERYONE in found:
        found[model["advisor"].lower()] = found.pop(EVERYONE)
    if model.get("version"):
        found = {
            name: Source(source.parts, str(model["version"])[:60], source.sha256) for name, source in found.items()
        }
    mode = str(defaults.get("mode")).lower() if isinstance(defaults, dict) else None
    return found, REQUEST_MODES.get(mode, "fine_tuned")


def _inside(root: Path, path: Path, file: Path) -> Path:
    """Return the path with links resolved; LoraError when it leaves the folder that the file may refer to."""
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise LoraError(f"{file}: {str(path)[:120]!r} is no path ({one_line(error)})") from error
    if not resolved.is_relative_to(root):
        raise LoraError(f"{file}: {str(path)[:200]} lies outside {root}; adapters elsewhere need --lora_path")
    return resolved
