"""Turn linked jobs into training and validation data that is worth training on, without a leak between the two.

    python prepare_training_data.py --manifest training_data_manifest.json

Reads the manifest of `link_training_data.py` and the prompts in the database that it names (read-only).
Writes to training_data/: training_data_ADVISOR_train.jsonl and ..._val.jsonl (image_path, prompt, response),
..._meta.json (counts, verdicts, SHA-256 of each file), ..._card.html (the data card, for a person), ..._verdicts.jsonl
(what became of each linked job) and ..._split.json (each photograph's side, which it keeps in later rounds).
"""

import common  # noqa: F401 - first: it says "run make setup" where packages are missing

# isort: split
import hashlib
import re
import statistics
import sys
import textwrap
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import click

from common.cli import PhaseCommand, option_group, print_settings
from common.data.candidates import Candidate, Manifest, apply_gates, judge_all, keep_newest, response_of, tallies
from common.data.card import charts, data_card, sheet
from common.data.database import shown
from common.data.findings import copied_sentence, findings_of
from common.data.lengths import LengthCounter
from common.data.near_duplicates import RADIUS, are_near, group_photos
from common.data.prompt_specification import Prompt, make_target, service_prompt
from common.data.quality import GATES, Target, read_levels
from common.data.split import Record, assign, settle
from common.dataset import messages_row, triplet_row
from common.errors import UserError
from common.files import find_input, read_json, sha256_file, write_json, write_jsonl, write_text
from common.tables import counted, paragraph, table

RECOMMENDED = 60  # examples; below it an adapter learns little
REASONS = {
    **{name: gate.meaning for name, gate in GATES.items()},
    "photograph_changed": "its photograph is gone, or another file since it was linked",
    "other_kept": "another analysis of the same photograph is kept (--keep all keeps every one)",
    "ties_sides": "near-duplicate of a training and of a validation photograph of an earlier round",
    "near_validation": "training photograph of an earlier round, near-duplicate of a validation photograph",
}


@click.command(cls=PhaseCommand, help=__doc__)
@option_group("Data")
@click.option("--manifest", default="training_data_manifest.jsonl", show_default=True, help="manifest of link_training_data.py")  # fmt: skip  # noqa: E501
@click.option("--advisor", help="advisor whose examples are prepared  [default: the manifest's only one]")
@click.option(
    "--output_dir",
    type=click.Path(path_type=Path),
    default="training_data",
    show_default=True,
    help="folder for all that is written",
)
@click.option("--format", "row_format", type=click.Choice(["triplet", "messages"]), default="triplet", show_default=True, help="triplet: image_path, prompt, response; messages: chat rows for other trainers")  # fmt: skip  # noqa: E501
@click.option("--dry_run", is_flag=True, help="print what would be written, and write nothing")
@option_group("Prompt")
@click.option("--system_prompt", type=click.Path(path_type=Path), help="file with a system prompt to use instead of the database's")  # fmt: skip  # noqa: E501
@click.option("--prompts_db", type=click.Path(path_type=Path), help="database to take the prompts from  [default: the newest in the manifest]")  # fmt: skip  # noqa: E501
@click.option("--dimensions", help='"7", "8", or names separated by commas  [default: those the prompt asks for]')
@option_group("Quality")
@click.option("--gate", multiple=True, metavar="NAME=LEVEL", help=f"switch a gate to reject, warn or off; may be repeated; gates: {', '.join(GATES)}")  # fmt: skip  # noqa: E501
@click.option("--no_mend", is_flag=True, help="reject analyses that could be read only after mending")
@click.option("--keep", type=click.Choice(["newest", "all"]), default="newest", show_default=True, help="of several analyses of one photograph: the newest that passes all gates, or all")  # fmt: skip  # noqa: E501
@option_group("Split")
@click.option("--train_split", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="share of the photographs to train on  [default: 0.8]")  # fmt: skip  # noqa: E501
@click.option("--val_split", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="share to validate on  [default: 0.2]")  # fmt: skip  # noqa: E501
@click.option("--seed", default=42, show_default=True, help="another seed, another split")
@click.option("--duplicate_distance", default=RADIUS, show_default=True, type=click.IntRange(0, 16), help="bits of 64 in which near-duplicates' perceptual hashes may differ; 0: identical pictures only")  # fmt: skip  # noqa: E501
@click.option("--split_record", type=click.Path(path_type=Path), help="file that remembers each photograph's side  [default: training_data_ADVISOR_split.json in output_dir]")  # fmt: skip  # noqa: E501
@click.option("--resplit", is_flag=True, help="forget which side photographs had in earlier rounds")
@option_group("Lengths")
@click.option("--base_model", default="Qwen/Qwen3-VL-4B-Instruct", show_default=True, help="folder or hub id whose tokenizer measures lengths, when it is on this machine")  # fmt: skip  # noqa: E501
@click.option("--max_seq_length", default=2048, show_default=True, type=click.IntRange(min=1), help="length that training allows")  # fmt: skip  # noqa: E501
@click.option("--max_image_size", default=1024, show_default=True, type=click.IntRange(min=32), help="long side of photographs in training, pixels")  # fmt: skip  # noqa: E501
def main(manifest, advisor, output_dir, row_format, dry_run, **options):
    options["val_split"] = shares(options.pop("train_split"), options["val_split"])
    levels = read_levels(options["gate"], options["no_mend"])
    manifest = Manifest(find_input(manifest))
    advisor, databases = choose_advisor(manifest, advisor)
    prompt = service_prompt(advisor, databases, options["system_prompt"], options["prompts_db"])
    target = make_target(prompt.text, options["dimensions"])
    print_settings("Prepare", shown_settings(manifest, advisor, output_dir, row_format, prompt, target, options))
    work = Work(advisor, manifest, target, prompt, levels, output_dir, row_format, options)
    work.judge()
    work.arrange()
    work.show()
    if dry_run:
        click.echo(f"\nDry run: nothing written; would write {', '.join(path.name for path in work.paths.values())}")
    else:
        work.write()


# ------------------------------------------------------------------------------------------------ what is prepared


def shares(train: float | None, val: float | None) -> float:
    """Return the share of validation; UserError when the two shares do not add up to 1."""
    if train is not None and val is not None and abs(train + val - 1) > 1e-6:
        raise UserError(f"--train_split {train} and --val_split {val} add up to {train + val:g}; they must make 1")
    return val if val is not None else 0.2 if train is None else round(1 - train, 9)


def choose_advisor(manifest: Manifest, advisor: str | None) -> tuple[str, list[Path]]:
    """Return (advisor as the manifest spells it, databases of its jobs); UserError with the choice that there is."""
    counts: Counter = Counter()
    databases: dict[str, dict[str, None]] = defaultdict(dict)
    for _, row in manifest.rows("reading"):
        counts[row["advisor"]] += 1
        if isinstance(row.get("database"), str):
            databases[row["advisor"].lower()][row["database"]] = None
    there = ", ".join(f"{name} ({count:,})" for name, count in counts.most_common(20)) or "none; link jobs first"
    if advisor is None and len({name.lower() for name in counts}) != 1:
        raise UserError(f"{manifest.path}: name one of its advisors with --advisor: {there}")
    spelled = [name for name, _ in counts.most_common() if advisor is None or name.lower() == advisor.strip().lower()]
    if not spelled:
        raise UserError(f"{manifest.path}: no jobs of {advisor!r}; advisors in it: {there}")
    if not re.fullmatch(r"\w[\w .-]*", spelled[0]):
        raise UserError(f"{manifest.path}: {shown(spelled[0])!r} cannot be part of a file name; rename the advisor")
    return spelled[0], list(map(Path, databases[spelled[0].lower()]))


def shown_settings(manifest, advisor, output_dir, row_format, prompt, target, options) -> dict[str, object]:
    return {
        "manifest": manifest.path,
        "advisor": advisor,
        "output_dir": output_dir,
        "format": row_format,
        "prompts": prompt.source,
        "dimensions": textwrap.shorten(
            f"{len(target.dimensions)}: {', '.join(target.dimensions)}", 70, placeholder=" ..."
        ),
        **{name: options[name] for name in ("keep", "val_split", "seed", "duplicate_distance")},
        **{name: options[name] for name in ("base_model", "max_seq_length", "max_image_size")},
    }


# ------------------------------------------------------------------------------------------------ the work


@dataclass
class Work:
    """One run: candidates, judged, arranged into groups and sides, shown and written."""

    advisor: str
    manifest: Manifest
    target: Target
    prompt: Prompt
    levels: dict[str, str]
    output_dir: Path
    row_format: str
    options: dict
    candidates: list[Candidate] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self):
        stem = f"training_data_{self.advisor}"
        suffixes = {
            "train": "jsonl",
            "val": "jsonl",
            "verdicts": "jsonl",
            "split": "json",
            "card": "html",
            "meta": "json",
        }
        self.paths = {name: self.output_dir / f"{stem}_{name}.{suffix}" for name, suffix in suffixes.items()}
        if self.options["split_record"]:
            self.paths["split"] = self.options["split_record"]
        self.warnings += self.prompt.warnings

    def judge(self) -> None:
        """Judge every linked job by itself."""
        self.candidates, self.thumbs, self.crowd = judge_all(self.manifest, self.advisor, self.target)

    def arrange(self) -> None:
        """Group the photographs, judge the analyses among each other, choose the examples, give each group its side."""
        self.record = self._record()
        radius = self.options["duplicate_distance"]
        thumbs = {**self.record.thumbs, **self.thumbs}
        groups = group_photos(thumbs, radius)
        for candidate, found in zip(self.candidates, self.crowd.verdicts(self._indices(groups)), strict=True):
            candidate.verdicts |= found
        self.copied = copied_sentence(self.candidates)
        self.findings = findings_of(self.candidates, self.target.dimensions)
        apply_gates(self.candidates, self.levels)
        groups, left_out = settle(groups, self.record.sides, lambda a, b: are_near(thumbs[a], thumbs[b], radius))
        for candidate in self.candidates:
            if candidate.sha256 in left_out and not candidate.reason:
                candidate.reason = left_out[candidate.sha256]
        known = {sha for group in groups for sha in group}
        self.group_of = self._indices([*groups, sorted(set(thumbs) - known)])
        if self.options["keep"] == "newest":
            keep_newest(self.candidates, self.group_of)
        self.groups = groups
        self._assign()

    def _record(self) -> Record:
        seed, val_split = self.options["seed"], self.options["val_split"]
        record = None if self.options["resplit"] else Record.read(self.paths["split"])
        if record and (record.seed != seed or abs(record.val_split - val_split) > 1e-9):
            self.warnings.append(
                f"the earlier split had seed {record.seed} and val_split {record.val_split:g}: split anew, so that "
                "photographs change sides; do not compare adapters trained on the earlier split with new ones"
            )
            record = None
        return record or Record(seed, val_split)

    def _indices(self, groups: list[list[str]]) -> list[int]:
        by_photo = {sha: i for i, group in enumerate(groups) for sha in group}
        return [by_photo[candidate.sha256] for candidate in self.candidates]

    def _assign(self) -> None:
        scores: dict[int, list[float]] = defaultdict(list)
        for candidate, group in zip(self.candidates, self.group_of, strict=True):
            if not candidate.reason:
                scores[group].append(candidate.overall or 0)
        chosen = sorted(scores)
        if len(chosen) < 2:
            self._show_gates()
        sides = assign(
            [self.groups[i] for i in chosen],
            [statistics.fmean(scores[i]) for i in chosen],
            self.record.sides,
            self.options["val_split"],
            self.options["seed"],
        )
        self.side_of = dict(zip(chosen, sides, strict=True))
        for candidate, group in zip(self.candidates, self.group_of, strict=True):
            if not candidate.reason:
                candidate.side = self.side_of[group]
        for group, side in self.side_of.items():
            for sha in self.groups[group]:
                if sha in self.thumbs and sha not in self.record.sides:
                    self.record.sides[sha], self.record.thumbs[sha] = side, self.thumbs[sha]

    # -- shown

    def examples(self, side: str) -> list[Candidate]:
        return [candidate for candidate in self.candidates if candidate.side == side]

    def show(self) -> None:
        """Print the summary; its first line says how many analyses carry the example's scores."""
        self._measure()
        click.echo("\n" + paragraph(self.copied["text"]))
        for finding in self.findings:
            click.echo(paragraph(f"- {finding}", "  ", "  "))
        self._show_gates()
        reasons = self._reasons()
        if reasons:
            rows = [[row["name"], row["jobs"], f"{row['meaning']}: {row['ids']}"] for row in reasons]
            click.echo("\nLinked, but no examples\n" + table(["reason", "jobs", "meaning and job ids"], rows))
        train, val = (len(self.examples(side)) for side in ("train", "val"))
        photos = Counter(self.side_of.values())
        click.echo()
        click.echo(
            paragraph(
                f"{counted(len(self.candidates), 'linked job')} = {counted(train, 'training example')} "
                f"({counted(photos['train'], 'photograph')}) + {counted(val, 'validation example')} "
                f"({counted(photos['val'], 'photograph')}) + {len(self.candidates) - train - val:,} left out"
            )
        )
        click.echo(paragraph(self.lengths["text"]))
        for warning in self.warnings:
            click.echo(paragraph(f"Warning: {warning}", hang="  "), err=True)

    def _show_gates(self) -> None:
        self.gates = tallies(self.candidates, self.levels)
        rows = [
            [name, gate["level"], gate["found"], gate["rejected"], GATES[name].meaning]
            for name, gate in self.gates.items()
            if gate["found"] or gate["level"] != GATES[name].default
        ]
        quiet = [name for name, gate in self.gates.items() if not gate["found"]]
        click.echo("\nGates\n" + table(["gate", "level", "found", "rejected", "what it finds"], rows))
        if quiet:
            click.echo(paragraph("nothing found: " + ", ".join(quiet), "  ", "  "))

    def _reasons(self) -> list[dict]:
        ids = defaultdict(list)
        for candidate in self.candidates:
            if candidate.reason:
                ids[candidate.reason].append(candidate.job_id)
        return [
            {
                "name": name,
                "jobs": len(ids[name]),
                "meaning": REASONS[name],
                "ids": ", ".join(shown(job[:8]) for job in ids[name][:8]) + (", ..." if len(ids[name]) > 8 else ""),
            }
            for name in REASONS
            if ids[name]
        ]

    def _measure(self) -> None:
        chosen = [candidate for candidate in self.candidates if candidate.side]
        counter = LengthCounter(self.options["base_model"], self.options["max_image_size"])
        for candidate, row in zip(chosen, self.manifest.read([c.place for c in chosen]), strict=True):
            size = candidate.width, candidate.height
            candidate.length = counter.count(self.prompt.text, response_of(row, self.target), size)
        lengths, limit = sorted(candidate.length for candidate in chosen), self.options["max_seq_length"]
        over = sum(length > limit for length in lengths)
        how = (
            f"tokenizer of {self.options['base_model']}" if counter.exact else "estimated, the tokenizer is not at hand"
        )
        self.lengths = {
            "exact": counter.exact,
            "median": lengths[len(lengths) // 2],
            "longest": lengths[-1],
            "over": over,
            "max_seq_length": limit,
            "text": f"Length in tokens ({how}): median {lengths[len(lengths) // 2]:,}, longest {lengths[-1]:,}; "
            f"{over:,} of {len(lengths):,} over max_seq_length {limit:,}",
        }
        if over:
            self.warnings.append(
                f"{over:,} of {len(lengths):,} examples are longer than max_seq_length {limit:,} (longest "
                f"{lengths[-1]:,}): training's default, auto, takes what memory allows; {limit:,} would leave them out"
            )
        if len(chosen) < RECOMMENDED:
            self.warnings.append(f"{len(chosen):,} examples are fewer than the recommended {RECOMMENDED}")

    # -- written

    def write(self) -> None:
        """Write all files, meta.json last: it names the SHA-256 of the others."""
        for side in ("train", "val"):
            write_jsonl(self.paths[side], self._rows(side))
        write_jsonl(self.paths["verdicts"], map(self._verdict, self.candidates, self.group_of))
        self.record.write(self.paths["split"])
        write_text(self.paths["card"], data_card(self._card()))
        write_json(self.paths["meta"], self._meta())
        for name in ("train", "val", "meta", "card"):
            click.echo(f"wrote {self.paths[name]}")

    def _rows(self, side: str):
        make = {"triplet": triplet_row, "messages": messages_row}[self.row_format]
        for row in self.manifest.read([candidate.place for candidate in self.examples(side)]):
            response = response_of(row, self.target)
            yield make(row["image_path"], self.prompt.text, response, row["job_id"], row["image_sha256"])

    def _verdict(self, candidate: Candidate, group: int) -> dict:
        return {
            "job_id": candidate.job_id,
            "side": candidate.side or None,
            "reason": candidate.reason or None,
            "detail": candidate.detail,
            "verdicts": candidate.verdicts,
            "image_path": candidate.image_path,
            "image_sha256": candidate.sha256,
            "photo_group": min(self.groups[group]) if group < len(self.groups) else None,
        }

    def _meta(self) -> dict:
        photos = Counter(self.side_of.values())
        return {
            "schema_version": 1,
            "advisor": self.advisor,
            "manifest": {"path": str(self.manifest.path), "sha256": sha256_file(self.manifest.path)},
            "options": {
                "format": self.row_format,
                **{
                    name: str(value) if isinstance(value, Path) else value
                    for name, value in sorted(self.options.items())
                },
            },
            "seed": self.options["seed"],
            "prompt": {"source": self.prompt.source, "sha256": hashlib.sha256(self.prompt.text.encode()).hexdigest()},
            "dimensions": list(self.target.dimensions),
            "counts": {
                "linked": len(self.candidates),
                "train": len(self.examples("train")),
                "val": len(self.examples("val")),
                "train_photographs": photos["train"],
                "val_photographs": photos["val"],
                "left_out": {row["name"]: row["jobs"] for row in self._reasons()},
                "projected": sum(candidate.projected for candidate in self.candidates if candidate.side),
                "overall_recomputed": sum(candidate.overall_changed for candidate in self.candidates if candidate.side),
            },
            "copied_scores": self.copied,
            "findings": self.findings,
            "warnings": self.warnings,
            "gates": self.gates,
            "lengths": {name: value for name, value in self.lengths.items() if name != "text"},
            "sha256": {path.name: sha256_file(path) for name, path in self.paths.items() if name != "meta"},
        }

    def _card(self) -> dict:
        train, val = self.examples("train"), self.examples("val")
        linking = self._linking()
        jobs = linking.get("jobs", 0)
        steps = [(jobs, "jobs in the databases")] if jobs else []
        passed = [candidate for candidate in self.candidates if candidate.reason not in GATES]
        steps += [
            (len(self.candidates), "linked to analysis and photograph"),
            (len(passed), "passed the gates"),
            (len(train) + len(val), "examples"),
            (len(train), "training"),
            (len(val), "validation"),
        ]
        return {
            "advisor": self.advisor,
            "copied": self.copied,
            "train": f"{len(train):,}",
            "val": f"{len(val):,}",
            "warnings": self.warnings,
            "steps": [
                {"count": n, "label": label, "percent": round(100 * n / max(steps[0][0], 1), 1)} for n, label in steps
            ],
            "findings": self.findings,
            **charts(train, val, self.target.dimensions, self.lengths["max_seq_length"]),
            "lengths": self.lengths,
            "gates": [
                {"name": name, "meaning": GATES[name].meaning, "ids": ", ".join(gate["job_ids"][:6]), **gate}
                for name, gate in self.gates.items()
            ],
            "not_examples": self._reasons(),
            "not_linked": [{"name": name, **reason} for name, reason in linking.get("reasons", {}).items()],
            "sheets": [sheet(side, self._pictures(side)) for side in ("train", "val")],
            "prompt": self.prompt.text,
            "prompt_source": f"From {self.prompt.source}; the service sends the photograph and this text.",
        }

    def _linking(self) -> dict:
        """Return the report that linking left beside the manifest, if it is of this manifest."""
        path = self.manifest.path.with_name(f"{self.manifest.path.stem}_report.json")
        report = read_json(path) if path.is_file() else {}
        same = report.get("sha256", {}).get(self.manifest.path.name) == sha256_file(self.manifest.path)
        return report if same else {}

    def _pictures(self, side: str) -> list[list[Candidate]]:
        """Return the analyses of each picture on a side."""
        members: dict[int, list[Candidate]] = defaultdict(list)
        for candidate, group in zip(self.candidates, self.group_of, strict=True):
            if self.side_of.get(group) == side:
                members[group].append(candidate)
        return list(members.values())


if __name__ == "__main__":
    sys.exit(main())
