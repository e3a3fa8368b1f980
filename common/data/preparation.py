"""The steps from judged analyses to examples: group photographs, gate analyses, choose, split, measure.

judged = judge_all(manifest, advisor, target)
choice = choose(judged, record, options)
arrangement = split(choice, judged.thumbs, record, target.specification)
lengths = measure(arrangement.examples(), task, options)
"""

import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from common.data.candidates import Candidate, Judged, apply_gates, keep_newest, response_of, tallies
from common.data.findings import left_to_learn
from common.data.lengths import LengthCounter
from common.data.near_duplicates import are_near, group_photos
from common.data.prompt_specification import Prompt
from common.data.quality import GATES, Target
from common.data.split import SplitRecord, assign, recovered, settle
from common.errors import UserError
from common.files import RowFile, read_json
from common.tables import counted
from integration.lora_patch.specification import PromptSpecification

RECOMMENDED = 60  # examples; below it an adapter learns little
MIN_VALIDATION = 5  # photographs; evaluation judges nothing on fewer, so that no adapter can be promoted
REASONS = {
    **{name: gate.meaning for name, gate in GATES.items()},
    "photograph_changed": "its photograph is gone, or another file since it was linked",
    "other_kept": "another analysis of the same photograph is kept (--keep all keeps every one)",
    "ties_sides": "near-duplicate of a training and of a validation photograph of an earlier round",
    "near_validation": "training photograph of an earlier round, near-duplicate of a validation photograph",
}


@dataclass(frozen=True)
class DataOptions:
    """How to prepare. ``val_split`` is a share of the photographs, ``max_seq_length`` in tokens, ``max_image_size`` in
    pixels of the long side."""

    row_format: str  # "triplet" or "messages"
    levels: dict[str, str]  # {gate: level}
    keep: str  # "newest" or "all"
    val_split: float
    seed: int
    duplicate_distance: int  # see `group_photos`
    resplit: bool
    base_model: str
    max_seq_length: int
    max_image_size: int


@dataclass(frozen=True)
class Task:
    """What is prepared: an advisor's rows of a manifest, for a prompt."""

    manifest: RowFile
    advisor: str
    prompt: Prompt
    target: Target


@dataclass(frozen=True)
class Choice:
    """Judged analyses in the groups of their photographs; those that are no examples have their reason."""

    candidates: list[Candidate]
    levels: dict[str, str]  # {gate: level}
    gates: dict[str, dict]  # see `tallies`
    left_to_learn: dict  # see `left_to_learn`
    groups: list[list[str]]  # SHA-256 of the photographs of each group
    group_of: list[int]  # of each candidate; len(groups) for photographs that are left out

    def left_out(self) -> dict[str, list[str]]:
        """Return {reason: job ids} of linked jobs that are no examples, in the order of `REASONS`."""
        ids = defaultdict(list)
        for candidate in self.candidates:
            ids[candidate.reason].append(candidate.job_id)
        return {name: ids[name] for name in REASONS if ids[name]}


@dataclass(frozen=True)
class Arrangement(Choice):
    """A choice with a side for each photograph."""

    side_of: dict[int, str]  # {group: "train" or "val"}
    record: SplitRecord  # of this and all earlier rounds

    def examples(self, side: str | None = None) -> list[Candidate]:
        """Return what is trained on and validated on, or one side of it."""
        return [c for c in self.candidates if c.side and side in (None, c.side)]

    def photographs(self) -> Counter:
        """Return how many different photographs each side has."""
        return Counter(self.side_of.values())

    def pictures(self, side: str) -> list[list[Candidate]]:
        """Return the analyses of each group of photographs on a side."""
        members: dict[int, list[Candidate]] = defaultdict(list)
        for candidate, group in zip(self.candidates, self.group_of, strict=True):
            if self.side_of.get(group) == side:
                members[group].append(candidate)
        return list(members.values())


def earlier_sides(paths: dict[str, Path], options: DataOptions) -> tuple[SplitRecord, list[str]]:
    """Return (the record of earlier rounds, empty where none applies; warnings).

    Where the record is gone and the files of a round are there, the sides are taken from these.
    """
    warnings = []
    record = None if options.resplit else SplitRecord.read(paths["split"])
    if record is None and not options.resplit:
        files = {side: paths[side] for side in ("train", "val")}
        record = recovered(files, *_earlier_settings(paths["meta"], options))
        if record:
            warnings.append(
                f"{paths['split']} is gone: the sides of {counted(len(record.sides), 'photograph')} were taken from "
                f"{' and '.join(path.name for path in files.values() if path.exists())}"
            )
    if record and (record.seed != options.seed or abs(record.val_split - options.val_split) > 1e-9):
        warnings.append(
            f"the earlier split had seed {record.seed} and val_split {record.val_split:g}: split again, so that "
            "photographs change sides; do not compare adapters trained on the earlier split with new ones"
        )
        record = None
    return record or SplitRecord(options.seed, options.val_split), warnings


def _earlier_settings(meta: Path, options: DataOptions) -> tuple[int, float]:
    """Return (seed, val_split) of meta.json's round, else today's."""
    value = read_json(meta) if meta.is_file() else {}
    earlier = value.get("options", {}) if isinstance(value, dict) else {}
    try:
        return int(earlier["seed"]), float(earlier["val_split"])
    except (KeyError, TypeError, ValueError):
        return options.seed, options.val_split


def choose(judged: Judged, record: SplitRecord, options: DataOptions) -> Choice:
    """Group the photographs, judge the analyses among each other, and choose the examples."""
    candidates, distance = judged.candidates, options.duplicate_distance
    thumbs = {**record.thumbs, **judged.thumbs}
    groups = group_photos(thumbs, distance)
    for candidate, found in zip(candidates, judged.crowd.verdicts(_group_of(candidates, groups)), strict=True):
        candidate.verdicts |= found
    # by content: the order of the manifest's rows changes nothing
    candidates = sorted(candidates, key=lambda c: (c.made, c.sha256, c.job_id))
    apply_gates(candidates, options.levels)
    groups, left_out = settle(groups, record.sides, lambda a, b: are_near(thumbs[a], thumbs[b], distance))
    for candidate in candidates:
        if candidate.sha256 in left_out and not candidate.reason:
            candidate.reason = left_out[candidate.sha256]
    group_of = _group_of(candidates, groups)
    if options.keep == "newest":
        keep_newest(candidates, group_of)
    learn = left_to_learn(candidates, group_of, options.levels["copied_scores"])
    return Choice(candidates, options.levels, tallies(candidates, options.levels), learn, groups, group_of)


def _group_of(candidates: list[Candidate], groups: list[list[str]]) -> list[int]:
    by_photo = {sha: i for i, group in enumerate(groups) for sha in group}
    return [by_photo.get(candidate.sha256, len(groups)) for candidate in candidates]


def split(
    choice: Choice, thumbs: dict[str, bytes], record: SplitRecord, specification: PromptSpecification
) -> Arrangement:
    """Give each group with an example its side, and enter the photographs in the record.

    ``thumbs`` are the thumbnails of the photographs by SHA-256. UserError with fewer than two photographs.
    """
    scores: dict[int, list[float]] = defaultdict(list)
    for candidate, group in zip(choice.candidates, choice.group_of, strict=True):
        if not candidate.reason:
            scores[group].append(specification.points(candidate.overall or 0))
    chosen = sorted(scores)
    means = [statistics.fmean(scores[group]) for group in chosen]
    sides = assign([choice.groups[group] for group in chosen], means, record.sides, record.val_split, record.seed)
    side_of = dict(zip(chosen, sides, strict=True))
    for candidate, group in zip(choice.candidates, choice.group_of, strict=True):
        if not candidate.reason:
            candidate.side = side_of[group]
    sides = {sha: side for group, side in side_of.items() for sha in choice.groups[group] if sha in thumbs}
    sides = {**sides, **record.sides}
    record = replace(
        record, sides=sides, thumbs={**record.thumbs, **{sha: thumbs[sha] for sha in sides.keys() & thumbs}}
    )
    return Arrangement(**vars(choice), side_of=side_of, record=record)


@dataclass(frozen=True)
class Lengths:
    """How long the examples are, in tokens."""

    exact: bool  # counted by the base model's tokenizer; else estimated from characters
    median: int
    longest: int
    over: int  # examples longer than max_seq_length
    max_seq_length: int


def measure(examples: list[Candidate], task: Task, options: DataOptions) -> Lengths:
    """Count the tokens of each example, kept with it, and sum up."""
    counter = LengthCounter(options.base_model, options.max_image_size)
    for candidate, row in zip(examples, task.manifest.read([c.place for c in examples]), strict=True):
        response, _ = response_of(row, task.target, candidate)
        candidate.length = counter.count(task.prompt.text, response, (candidate.width, candidate.height))
    lengths = sorted(candidate.length for candidate in examples)
    over = sum(length > options.max_seq_length for length in lengths)
    return Lengths(counter.exact, lengths[len(lengths) // 2], lengths[-1], over, options.max_seq_length)


class NoScores(UserError):
    """No training example has scores of its own."""

    exit_code = 5


def check_scores(train: list[Candidate], accepted: bool) -> None:
    """NoScores where there are only comments to learn from and the user did not ask for that."""
    if not accepted and all(candidate.masked for candidate in train):
        raise NoScores(
            "no scores are left to learn from: every training example carries the scores of its prompt's example; link "
            "other jobs, or train on the comments alone with --accept_copied_scores"
        )


def warnings_of(arrangement: Arrangement, lengths: Lengths) -> list[str]:
    """Return what a person should know before training, a sentence each."""
    warnings, examples, photos = [], arrangement.examples(), arrangement.photographs()
    if photos["val"] < MIN_VALIDATION:
        warnings.append(
            f"{photos['val']} of the {MIN_VALIDATION} validation photographs that evaluation needs: no adapter trained "
            "on this set can be promoted; link more jobs, or raise --val_split"
        )
    if lengths.over:
        warnings.append(
            f"{lengths.over:,} of {len(examples):,} examples are longer than max_seq_length "
            f"{lengths.max_seq_length:,} (longest {lengths.longest:,}): training's default, auto, takes what memory "
            f"allows; {lengths.max_seq_length:,} would leave them out"
        )
    if len(examples) < RECOMMENDED:
        warnings.append(f"{len(examples):,} examples are fewer than the recommended {RECOMMENDED}")
    linked = len(arrangement.candidates)
    for name, gate in arrangement.gates.items():
        if gate["level"] == "warn" and 2 * gate["found"] > linked:
            warnings.append(f"gate {name}: {gate['found']:,} of {linked:,} analyses, {GATES[name].meaning}")
    return warnings
