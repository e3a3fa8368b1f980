"""What an evaluation is given: the adapter, its base, the adapter in use, and photographs that none was trained on."""

from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx

from common.analysis import DIMENSIONS7, parse_lenient
from common.dataset import load_examples
from common.errors import UserError, refuse
from common.evaluation.generations import Item
from common.evaluation.model_source import ModelSource, Sampling
from common.files import find_input, read_json, sha256_file
from common.records import ARGS, software_versions
from integration.lora_patch import versions
from integration.lora_patch.fingerprint import base_fingerprint, compare_fingerprints
from integration.lora_patch.photo import MAX_IMAGE_SIZE, PhotoError, load_photo
from integration.lora_patch.prompts import prompt_dimensions
from integration.lora_patch.versions import CONFIG, MLX_WEIGHTS, PEFT_WEIGHTS
from integration.lora_patch.vlm import Base, load_base, response_tokens

AUTO = "auto"
LONGEST = 2048  # tokens; the longest real analyses have some 1,300
HIDDEN = ("training", "adapters", "report", "warnings", "advisor", "found")  # resolved settings that are no options


def resolve(settings: SimpleNamespace) -> None:
    """Fill in what was not given on the command line; UserError for an adapter folder that is none.

    Adds ``training`` (the adapter's training_args.json or {}), ``adapters`` (folder by arm), ``advisor``, ``report``
    (path of the JSON), ``warnings`` and ``found`` (names of the settings that were filled in).
    """
    settings.warnings = []
    given = dict(vars(settings))
    settings.training = _training_args(settings)
    settings.advisor = settings.training.get("advisor") or versions.parse_folder(settings.lora_path)[0]
    settings.base_model = settings.base_model or settings.training.get("base_model")
    if not settings.base_model:
        raise UserError(f"{settings.lora_path}: no {ARGS} that names its base; give --base_model")
    trained = (settings.training.get("val_data") or {}).get("path")
    if not settings.val_data and not trained:
        raise UserError(f"{settings.lora_path}: its {ARGS} names no validation data; give --val_data")
    settings.val_data = find_input(settings.val_data or trained)
    settings.max_image_size = (
        settings.max_image_size or (settings.training.get("settings") or {}).get("max_image_size") or MAX_IMAGE_SIZE
    )
    settings.adapters = {"candidate": settings.lora_path}
    deployed = _deployed(settings)
    if deployed:
        settings.adapters["deployed"] = deployed
    settings.deployed = str(deployed or "none")
    settings.report = _report_path(settings.output_report)
    settings.found = [name for name in ("base_model", "val_data", "max_image_size") if given[name] is None]
    if settings.max_tokens != AUTO and not (settings.max_tokens.isdecimal() and int(settings.max_tokens)):
        raise UserError(f"--max_tokens {settings.max_tokens}: a number of tokens from 1, or {AUTO}")


def shown(settings: SimpleNamespace) -> dict:
    """Return the settings as they are printed and recorded."""
    return {name: value for name, value in vars(settings).items() if name not in HIDDEN}


def load_items(settings: SimpleNamespace) -> list[Item]:
    """Read the held-out examples and open every photograph.

    UserError, all in one, for photographs that cannot be read and for those that the adapter (or the one in use) was
    trained on, told by their bytes.
    """
    examples = load_examples(settings.val_data)[: settings.max_examples]
    trained = {arm: _trained_photos(folder) for arm, folder in settings.adapters.items()}
    items, problems = [], []
    for index, example in enumerate(examples):
        try:
            for path in example.image_paths:
                load_photo(path, 64)
            hashes = [sha256_file(path) for path in example.image_paths]
        except PhotoError as error:
            problems.append(f"{example.source}: {error}")
            continue
        for arm, photos in trained.items():
            seen = [str(path) for path, sha in zip(example.image_paths, hashes, strict=True) if sha in photos]
            if seen:
                who = "the adapter" if arm == "candidate" else "the deployed adapter"
                problems.append(f"{example.source}: {', '.join(seen)}: {who} was trained on this photograph")
        items.append(Item(index, example, hashes, prompt_dimensions(example.prompt) or list(DIMENSIONS7)))
    refuse(problems, limit=100)
    unreadable = sum(parse_lenient(item.example.response)[0] is None for item in items)
    if unreadable:
        settings.warnings.append(
            f"{unreadable} of {len(items)} references are no analysis: they count for the loss alone."
        )
    recorded = (settings.training.get("val_data") or {}).get("sha256")
    if recorded and recorded != sha256_file(settings.val_data):
        settings.warnings.append(
            f"{settings.val_data} is not the validation data of the training, or has changed since."
        )
    return items


def load_models(settings: SimpleNamespace, items: list[Item]) -> ModelSource:
    """Load base and adapters; UserError when the base is not the one that an adapter was trained on."""
    base = load_base(settings.base_model)
    try:
        fingerprint = base_fingerprint(base.path, settings.base_model)
    except ValueError as error:
        raise UserError(str(error)) from error
    problems = []
    for folder in settings.adapters.values():
        trained = _read_args(folder).get("base_fingerprint")
        if trained:
            errors, warnings = compare_fingerprints(trained, fingerprint)
            problems += [f"{folder}: {error}; name the right one by --base_model" for error in errors]
            settings.warnings += [f"{folder}: {warning}." for warning in warnings]
        else:
            settings.warnings.append(
                f"{folder}: no {ARGS}, so neither its base nor its training data could be checked."
            )
    refuse(problems)
    settings.max_tokens = _max_tokens(settings, base, items)
    facts = {
        "base": fingerprint,
        "adapters": {arm: versions.adapter_hashes(folder) for arm, folder in settings.adapters.items()},
        "software": software_versions(),
        "device": device_name(),
    }
    sampling = Sampling(
        settings.max_tokens, settings.batch_size, settings.temperature, settings.seed, settings.max_image_size
    )
    return ModelSource(base, settings.adapters, sampling, settings.constrained, facts)


def device_name() -> str:
    info = mx.device_info()
    return str(info.get("device_name") or info.get("architecture") or mx.default_device())


def _max_tokens(settings: SimpleNamespace, base: Base, items: list[Item]) -> int:
    if settings.max_tokens != AUTO:
        return int(settings.max_tokens)
    longest = max(len(response_tokens(base, item.example.response)[0]) for item in items)
    return min(LONGEST, -(-2 * longest // 64) * 64)


def _training_args(settings: SimpleNamespace) -> dict:
    folder = settings.lora_path
    if not folder.is_dir():
        raise UserError(f"{folder}: no such adapter folder; name the one that training wrote")
    if not (folder / CONFIG).is_file() or not any((folder / file).is_file() for file in (PEFT_WEIGHTS, MLX_WEIGHTS)):
        raise UserError(
            f"{folder}: no adapter there ({CONFIG} or its weights are missing); name the folder that training wrote"
        )
    return _read_args(folder)


def _read_args(folder: Path) -> dict:
    if not (folder / ARGS).is_file():
        return {}
    found = read_json(folder / ARGS)
    if not isinstance(found, dict):
        raise UserError(f"{folder / ARGS}: a JSON object was expected; train again")
    return found


def _trained_photos(folder: Path) -> set[str]:
    return set((_read_args(folder).get("train_data") or {}).get("photos") or ())


def _deployed(settings: SimpleNamespace) -> Path | None:
    """Return the folder of the adapter in use, None when there is none or it is the candidate itself."""
    if settings.deployed == "none":
        return None
    if settings.deployed == AUTO:
        if not settings.advisor:
            return None
        place = versions.record_path(settings.lora_path.parent, settings.advisor)
        if not place.is_file():
            return None
    else:
        place = Path(settings.deployed)
    if (place / versions.RECORD).is_file():
        place = place / versions.RECORD
    folder = versions.deployed_folder(place) if place.suffix == ".json" else place
    if folder is None:  # every version was taken back
        return None
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no adapter there; name the one in use by --deployed, or --deployed none")
    if versions.adapter_hashes(folder) == versions.adapter_hashes(settings.lora_path):
        settings.warnings.append(
            f"{settings.lora_path} is the version in use itself, so it is compared with its base alone."
        )
        return None
    return folder


def _report_path(name: str) -> Path:
    path = Path(name)
    if path.is_dir() or name.endswith("/"):
        return path / "comparison_report.json"
    return path.with_suffix(".json") if path.suffix in (".html", ".json") else path.with_name(path.name + ".json")
