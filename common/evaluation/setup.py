"""What an evaluation is given: the adapter, its base, the adapter in use, and photographs that none was trained on."""

import contextlib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from common.dataset import load_examples, read_meta
from common.errors import UserError, refuse
from common.evaluation.generations import Item
from common.evaluation.model_source import Decoding, ModelSource
from common.evaluation.scoring import reference_scores
from common.files import find_input, sha256_file
from common.model.step import round_up
from common.records import software_versions
from integration.lora_patch import versions
from integration.lora_patch.analysis import parse_lenient
from integration.lora_patch.fingerprint import base_fingerprint, compare_fingerprints
from integration.lora_patch.memory import find_device
from integration.lora_patch.photo import MAX_IMAGE_SIZE, PhotoError, load_photo
from integration.lora_patch.prompts import UnreadablePrompt, read_specification
from integration.lora_patch.specification import PromptSpecification
from integration.lora_patch.versions import ARGS, CONFIG, MLX_WEIGHTS, PEFT_WEIGHTS
from integration.lora_patch.vlm import Base, load_base, response_tokens

AUTO = "auto"
LONGEST = 2048  # tokens; the longest real analyses have some 1,300


@dataclass(frozen=True)
class EvaluationOptions:
    """What the command line says; None where it says nothing."""

    lora_path: Path  # adapter folder, the candidate
    base_model: str | None  # hub id or folder
    deployed: str  # adapter folder, deployed.json, "none" or "auto"
    val_data: str | None
    max_examples: int | None
    max_image_size: int | None  # pixels of the long side
    num_samples: int  # outputs a photograph and arm
    temperature: float  # 0: greedy
    seed: int
    max_tokens: str  # of an output: a number, or "auto"
    batch_size: int
    constrained: bool
    timing_examples: int  # photographs timed at first
    timing_seconds: float  # for more timed runs, while they may decide a gate
    fresh: bool
    from_outputs: Path | None
    gates: Path | None
    strict: bool  # promote by "pass" alone
    output_report: str
    sample_outputs: bool


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, with everything filled in that the command line left open."""

    options: EvaluationOptions
    training: dict  # the candidate's training_args.json, {} where there is none
    advisor: str | None
    base_model: str
    val_data: Path
    max_image_size: int  # pixels of the long side
    adapters: dict[str, Path]  # folder by arm: "candidate" and, if one is in use, "deployed"
    report: Path  # comparison_report.json
    warnings: list[str]  # for the report; those that come up later are added

    def settings(self) -> dict:
        """Return the settings as they are printed and recorded."""
        given = {field.name: getattr(self.options, field.name) for field in fields(EvaluationOptions)}
        resolved = {name: getattr(self, name) for name in ("base_model", "val_data", "max_image_size")}
        return given | resolved | {"deployed": str(self.adapters.get("deployed", "none"))}


def resolve(options: EvaluationOptions) -> Evaluation:
    """Fill in what was not given on the command line; UserError for a folder without an adapter."""
    folder, warnings = options.lora_path, []
    training = _training_args(folder)
    advisor = training.get("advisor") or versions.parse_folder(folder)[0]
    base_model = options.base_model or training.get("base_model")
    if not base_model:
        raise UserError(f"{folder}: no {ARGS} that names its base; give --base_model")
    trained = (training.get("val_data") or {}).get("path")
    if not options.val_data and not trained:
        raise UserError(f"{folder}: its {ARGS} names no validation data; give --val_data")
    if options.max_tokens != AUTO and not (options.max_tokens.isdecimal() and int(options.max_tokens)):
        raise UserError(f"--max_tokens {options.max_tokens}: a number of tokens from 1, or {AUTO}")
    recorded_size = (training.get("settings") or {}).get("max_image_size")
    deployed = _deployed(options, advisor, warnings)
    return Evaluation(
        options,
        training,
        advisor,
        base_model,
        find_input(options.val_data or trained),
        options.max_image_size or recorded_size or MAX_IMAGE_SIZE,
        {"candidate": folder} | ({"deployed": deployed} if deployed else {}),
        _report_path(options.output_report),
        warnings,
    )


def load_items(evaluation: Evaluation) -> list[Item]:
    """Read the held-out examples and open every photograph.

    UserError, all in one, for photographs that cannot be read and for those that the adapter (or the one in use) was
    trained on, recognised by their bytes.
    """
    meta = read_meta(evaluation.val_data) or {}
    recorded = evaluation.training.get("specification") or meta.get("specification")
    examples = load_examples(evaluation.val_data)[: evaluation.options.max_examples]
    trained = {arm: _trained_photos(folder) for arm, folder in evaluation.adapters.items()}
    items, problems, untold = [], [], 0
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
        specification = _specification(recorded, example.prompt)
        untold += specification is None
        items.append(Item(index, example, hashes, specification or PromptSpecification()))
    refuse(problems, limit=100)
    if untold:
        evaluation.warnings.append(
            f"{evaluation.val_data}: the prompt of {untold} of {len(items)} examples does not tell which dimensions it "
            "wants; answers are held to the usual seven. Prepare the data again with --dimensions."
        )
    unreadable = sum(
        parse_lenient(item.example.response, highest=item.specification.score_range[1])[0] is None for item in items
    )
    if unreadable:
        evaluation.warnings.append(
            f"{unreadable} of {len(items)} references are no analysis: they count for the loss alone."
        )
    trained_with = (evaluation.training.get("val_data") or {}).get("sha256")
    if trained_with and trained_with != sha256_file(evaluation.val_data):
        evaluation.warnings.append(
            f"{evaluation.val_data} is not the validation data of the training, or has changed since."
        )
    return items


def training_scores(evaluation: Evaluation) -> dict | None:
    """Return {"means": {dimension or "overall_score": mean}, "examples": n} of the scores trained on, without the
    masked ones; None, with a warning, where the training data cannot be read."""
    path = (evaluation.training.get("train_data") or {}).get("path")
    try:
        examples = load_examples(path) if path and Path(path).is_file() else []
    except UserError:
        examples = []
    found: dict[str, list[float]] = {}
    for example in examples:
        specification = _specification(evaluation.training.get("specification"), example.prompt)
        highest = (specification or PromptSpecification()).score_range[1]
        analysis = parse_lenient(example.response, highest=highest)[0]
        for name, score in reference_scores(example.response, analysis, example.masked_spans, highest).items():
            found.setdefault(name, []).append(score)
    if not found:
        evaluation.warnings.append(
            "The training data cannot be read, so the scores are not compared with the mean of the training scores."
        )
        return None
    return {"means": {name: float(np.mean(scores)) for name, scores in found.items()}, "examples": len(examples)}


def load_models(evaluation: Evaluation, items: list[Item]) -> ModelSource:
    """Load base and adapters; UserError when the base is not the one that an adapter was trained on."""
    base = load_base(evaluation.base_model)
    fingerprint = base_fingerprint(base.path, evaluation.base_model)
    problems = []
    for folder in evaluation.adapters.values():
        trained = versions.training_args(folder).get("base_fingerprint")
        if trained:
            errors, warnings = compare_fingerprints(trained, fingerprint)
            problems += [f"{folder}: {error}; name the right one by --base_model" for error in errors]
            evaluation.warnings.extend(f"{folder}: {warning}." for warning in warnings)
        else:
            evaluation.warnings.append(
                f"{folder}: no {ARGS}, so neither its base nor its training data could be checked."
            )
    refuse(problems)
    options = evaluation.options
    sampling = Decoding(
        _max_tokens(options.max_tokens, base, items),
        options.batch_size,
        options.temperature,
        options.seed,
        evaluation.max_image_size,
    )
    facts = {
        "base": fingerprint,
        "adapters": {arm: versions.adapter_hashes(folder) for arm, folder in evaluation.adapters.items()},
        "software": software_versions(),
        "device": find_device().name,
        "max_tokens": sampling.max_tokens,
    }
    return ModelSource(base, evaluation.adapters, sampling, options.constrained, facts)


def _specification(recorded: dict | None, prompt: str) -> PromptSpecification | None:
    """Return what a prompt demands: as recorded with the data (unless damaged), else as read; None if it is silent."""
    with contextlib.suppress(ValueError):
        if recorded:
            return PromptSpecification.from_dict(recorded)
    try:
        return read_specification(prompt)
    except UnreadablePrompt:
        return None


def _max_tokens(given: str, base: Base, items: list[Item]) -> int:
    if given != AUTO:
        return int(given)
    longest = max(len(response_tokens(base, item.example.response)[0]) for item in items)
    return min(LONGEST, round_up(2 * longest, 64))


def _training_args(folder: Path) -> dict:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such adapter folder; name the one that training wrote")
    if not (folder / CONFIG).is_file() or not any((folder / file).is_file() for file in (PEFT_WEIGHTS, MLX_WEIGHTS)):
        raise UserError(
            f"{folder}: no adapter there ({CONFIG} or its weights are missing); name the folder that training wrote"
        )
    return versions.training_args(folder)


def _trained_photos(folder: Path) -> set[str]:
    return set((versions.training_args(folder).get("train_data") or {}).get("photos") or ())


def _deployed(options: EvaluationOptions, advisor: str | None, warnings: list[str]) -> Path | None:
    """Return the folder of the adapter in use, None when there is none or it is the candidate itself."""
    if options.deployed == "none":
        return None
    if options.deployed == AUTO:
        place = versions.record_path(options.lora_path.parent, advisor) if advisor else None
        if place is None or not place.is_file():
            return None
    else:
        place = Path(options.deployed)
    if (place / versions.RECORD).is_file():
        place = place / versions.RECORD
    folder = versions.deployed_folder(place) if place.suffix == ".json" else place
    if folder is None:  # every version was taken back
        return None
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no adapter there; name the one in use by --deployed, or --deployed none")
    if versions.adapter_hashes(folder) == versions.adapter_hashes(options.lora_path):
        warnings.append(f"{options.lora_path} is the version in use itself, so it is compared with its base alone.")
        return None
    return folder


def _report_path(name: str) -> Path:
    path = Path(name)
    if path.is_dir() or name.endswith("/"):
        return path / "comparison_report.json"
    return path.with_suffix(".json") if path.suffix in (".html", ".json") else path.with_name(path.name + ".json")
