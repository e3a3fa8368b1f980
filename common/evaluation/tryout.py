"""What base and adapter say about a person's own photographs, side by side: on the terminal and on one page.

    python evaluate_lora.py --photo me.jpg
    python evaluate_lora.py --photo me.jpg --versions v1,v2

Answers are greedy, to the prompt that the service sends, as the adapter's training data hold it.
"""

import contextlib
import json
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.cli import next_step
from common.dataset import load_examples
from common.errors import UserError
from common.evaluation.report_page import Cell
from common.evaluation.setup import LONGEST
from common.files import find_input
from common.pages import embedded, write_page
from integration.lora_patch.analysis import parse_lenient
from integration.lora_patch.photo import MAX_IMAGE_SIZE, PhotoError, load_photo
from integration.lora_patch.prompts import UnreadablePrompt, read_specification
from integration.lora_patch.specification import PromptSpecification
from integration.lora_patch.versions import (
    ARGS,
    deployed_folder,
    find_versions,
    parse_folder,
    record_path,
    training_args,
)

TEMPLATE = Path(__file__).with_name("tryout.html.j2")
PHOTO_SIDE = 1000  # pixels of the photograph on the page
WIDTH = 100  # columns where there is no terminal


@dataclass(frozen=True)
class Model:
    """One of the models that answer: the base (no folder), or a version of the adapter."""

    name: str
    folder: Path | None


@dataclass(frozen=True)
class Trial:
    """What all models are asked, and with which base."""

    models: tuple[Model, ...]
    base_model: str
    prompt: str
    specification: PromptSpecification | None  # what the prompt demands of an answer; None where it does not say
    max_image_size: int  # pixels
    max_tokens: int


@dataclass(frozen=True)
class ModelAnswer:
    """What one model said about one photograph."""

    model: Model
    text: str
    seconds: float
    analysis: dict | None  # None where the text holds none
    problem: str  # what the service's format check finds first; "" for an answer in the format

    @property
    def scores(self) -> dict[str, float]:
        """Return the scores by dimension; {} where there is no analysis."""
        return {row["name"]: row["score"] for row in (self.analysis or {}).get("dimensions", []) if "score" in row}

    @property
    def comments(self) -> dict[str, str]:
        """Return comment and recommendation by dimension."""
        rows = (self.analysis or {}).get("dimensions", [])
        return {row["name"]: " ".join(filter(None, (row.get("comment"), row.get("recommendation")))) for row in rows}


# -- what is asked of whom --------------------------------------------------------------------------------------------


def make_task(
    lora_path: Path | None, advisor: str | None, versions: str | None, base_model: str | None, val_data: str | None,
    max_tokens: str,
) -> Trial:  # fmt: skip
    """Find the models, their base and their prompt.

    ``lora_path``: an adapter folder, or the folder of all adapters (models), in which the one in use is taken, else
    the newest. ``versions``: "v1,v2", in place of base and adapter. UserError where something is missing.
    """
    place = lora_path or Path("models")
    if not place.is_dir():
        raise UserError(f"{place}: no such folder; train an adapter first, or name one with --lora_path")
    named = [name.strip().lower() for name in (versions or "").split(",") if name.strip()]
    if (place / "adapter_config.json").is_file():
        if named:
            raise UserError(
                f"--versions needs the folder of all versions, not {place}; give --lora_path {place.parent}"
            )
        models = [Model("base", None), Model(_version(place), place)]
    else:
        models = _chosen(place, _advisor(place, advisor), named)
    tuned = next((model for model in models if model.folder), None)
    if tuned is None:
        raise UserError("--versions base: name at least one version")
    args = training_args(tuned.folder)
    base = base_model or args.get("base_model")
    if not base:
        raise UserError(f"{tuned.folder}: no {ARGS} that names its base; give --base_model")
    prompt = _prompt(tuned.folder, args, val_data)
    size = (args.get("settings") or {}).get("max_image_size") or MAX_IMAGE_SIZE
    longest = int(max_tokens) if max_tokens.isdecimal() else LONGEST
    specification = None
    with contextlib.suppress(UnreadablePrompt):
        specification = read_specification(prompt)
    return Trial(tuple(models), base, prompt, specification, size, longest)


def _version(folder: Path) -> str:
    advisor, number = parse_folder(folder)
    return f"v{number}" if advisor else folder.name


def _advisor(models: Path, advisor: str | None) -> str:
    there = sorted({name for path in models.iterdir() if (path / ARGS).is_file() and (name := parse_folder(path)[0])})
    if advisor is None and len(there) == 1:
        return there[0]
    if advisor not in there:
        named = ", ".join(there) or "none"
        raise UserError(f"{models}: advisors with an adapter: {named}; name one of them with --advisor")
    return advisor


def _chosen(models: Path, advisor: str, named: list[str]) -> list[Model]:
    have = {f"v{number}": folder for number, folder in find_versions(models, advisor).items()}
    if missing := [name for name in named if name not in have and name != "base"]:
        raise UserError(f"{models}: no {', '.join(missing)} of {advisor}; there are {', '.join(have) or 'none'}")
    if not named:
        in_use = deployed_folder(record_path(models, advisor))
        named = ["base", _version(in_use) if in_use else list(have)[-1]]
    return [Model(name, have.get(name)) for name in named]


def _prompt(folder: Path, args: dict, val_data: str | None) -> str:
    """Return the prompt that the service sends, from the data that the adapter was trained on."""
    recorded = [(args.get(side) or {}).get("path") for side in ("val_data", "train_data")]
    for path in filter(None, [val_data] if val_data else recorded):
        if val_data or Path(path).is_file():
            return load_examples(find_input(path))[0].prompt
    raise UserError(f"{folder}: its training data are gone ({recorded[-1]}), and its prompt with them; give --val_data")


# -- answering --------------------------------------------------------------------------------------------------------


def try_photos(photos: list[Path], task: Trial, page: Path) -> None:
    """Let every model answer to every photograph; show the answers while they are written, and write the page."""
    problems = []
    for photo in photos:
        try:
            load_photo(photo, task.max_image_size)
        except PhotoError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    answer = load_answering(task)
    shown = []
    for photo in photos:
        answers = show_live(photo, task, answer)
        show_result(photo, answers)
        shown.append((photo, answers))
    write_tryout_page(page, shown, task)
    next_step(f"\nOpen {page}: the photograph, every score and the whole text of each answer", _following(task))


def _following(task: Trial) -> str:
    return f"python evaluate_lora.py --lora_path {task.models[-1].folder}"


def write_tryout_page(page: Path, shown: list[tuple[Path, list[ModelAnswer]]], task: Trial) -> None:
    """Write the page: each photograph with the answers of the task's models, in their order."""
    names = [model.name for model in task.models]
    colours = [
        "candidate" if model == task.models[-1] else "deployed" if model.folder else "base" for model in task.models
    ]
    rows = [
        {
            "photo": photo,
            "picture": embedded(photo, PHOTO_SIDE),
            "answers": answers,
            "comments": [
                (name, [Cell(texts=[answer.comments.get(name, "-")]) for answer in answers])
                for name in _dimensions(answers)
            ],
        }
        for photo, answers in shown
    ]
    columns = [(colour, name, "") for colour, name in zip(colours, names, strict=True)]
    write_page(page, TEMPLATE, shown=rows, names=names, columns=columns, task=task, dimensions=_dimensions, told=_told)


def load_answering(task: Trial) -> Callable[[Model, Path], Iterator[str]]:
    """Load base and adapters; return a function that yields a model's answer to a photograph piece by piece.

    UserError when the base is not the one that an adapter was trained on.
    """
    from integration.lora_patch.adapters import read_adapter
    from integration.lora_patch.engine import Engine, Request
    from integration.lora_patch.fingerprint import base_fingerprint, compare_fingerprints
    from integration.lora_patch.sources import adapter_in
    from integration.lora_patch.vlm import encode, load_base, prepare_row

    base = load_base(task.base_model)
    fingerprint = base_fingerprint(base.path, task.base_model)
    adapters = {}
    for model in task.models:
        if model.folder:
            trained_on = training_args(model.folder).get("base_fingerprint")
            errors = compare_fingerprints(trained_on, fingerprint)[0] if trained_on else []
            if errors:
                raise UserError(f"{model.folder}: {errors[0]}; name the right base with --base_model")
            adapters[model.name] = read_adapter(adapter_in(model.folder))
    engine = Engine(base)
    rows = {}  # the photograph's features are the same for every model

    def answer(model: Model, photo: Path) -> Iterator[str]:
        if photo not in rows:
            rows.clear()
            rows[photo] = prepare_row(base, encode(base, task.prompt, [load_photo(photo, task.max_image_size)]))
        tokens, told = [], ""
        request = Request(rows[photo], str(photo))
        for token in engine.stream(request, task.max_tokens, adapters.get(model.name)):
            tokens.append(token)
            text = engine.text(tokens)
            if not text.endswith("\ufffd"):  # half a character
                yield text[len(told) :]
                told = text

    return answer


def judged(model: Model, text: str, seconds: float, specification: PromptSpecification | None) -> ModelAnswer:
    """Read one answer as the service does."""
    problems = specification.check(text) if specification else []
    highest = (specification or PromptSpecification()).score_range[1]
    return ModelAnswer(model, text, seconds, parse_lenient(text, highest=highest)[0], problems[0] if problems else "")


# -- the terminal -----------------------------------------------------------------------------------------------------


def show_live(photo: Path, task: Trial, answer: Callable[[Model, Path], Iterator[str]]) -> list[ModelAnswer]:
    """Show the answers in columns while they are written; where there is no terminal, nothing."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    texts, answers = {model.name: "" for model in task.models}, []
    with Live(console=console, refresh_per_second=8, transient=True) as live:
        for model in task.models:
            started = time.perf_counter()
            for piece in answer(model, photo):
                texts[model.name] += piece
                if console.is_terminal:
                    live.update(_columns(photo, texts, console.width, console.height - 5))
            seconds = time.perf_counter() - started
            answers.append(judged(model, texts[model.name], seconds, task.specification))
    return answers


def _columns(photo: Path, texts: dict[str, str], width: int, height: int):
    """Return the answers so far as a table that fits the terminal: of a long one, the end that is being written."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, title=str(photo), expand=True)
    for name in texts:
        grid.add_column(name, ratio=1, overflow="fold")
    column = max(10, width // len(texts) - 4)
    shown = (textwrap.wrap(text, column, replace_whitespace=False) for text in texts.values())
    grid.add_row(*(Text("\n".join("\n".join(lines).splitlines()[-height:])) for lines in shown))
    return grid


def show_result(photo: Path, answers: list[ModelAnswer]) -> None:
    """Print scores aligned, then the comments."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    scores = Table(box=box.SIMPLE_HEAD, title=str(photo), title_justify="left", show_edge=False)
    scores.add_column("")
    for answer in answers:
        scores.add_column(answer.model.name, justify="right")
    for name in _dimensions(answers):
        scores.add_row(name, *(_told(answer.scores.get(name)) for answer in answers))
    overall = [(answer.analysis or {}).get("overall_score") for answer in answers]
    scores.add_row("Overall", *map(_told, overall))
    scores.add_row("In the service's format", *("yes" if not answer.problem else "no" for answer in answers))
    scores.add_row("Seconds", *(f"{answer.seconds:.1f}" for answer in answers))
    console.print(scores)
    console.print()
    comments = Table(box=box.SIMPLE_HEAD, show_edge=False, expand=True)
    comments.add_column("", ratio=1)
    for answer in answers:
        comments.add_column(answer.model.name, ratio=3)
    for name in _dimensions(answers):
        comments.add_row(name, *(Text(answer.comments.get(name, "-")) for answer in answers))
    console.print(comments)
    for answer in answers:
        if answer.problem:
            console.print(Text(f"{answer.model.name}: not in the service's format: {answer.problem}"))


def _dimensions(answers: list[ModelAnswer]) -> list[str]:
    """Return the dimensions that any answer scores, in the order in which they come."""
    return list(dict.fromkeys(name for answer in answers for name in answer.scores))


def _told(value: object) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, int | float) else json.dumps(value)
