"""Damage what a user can hand in, at random, and see that nothing breaks: no traceback, no input slower than a second.

    python -m tests.fuzz.fuzz parsers --seconds 60          # mutated answers and prompts through every parser
    python -m tests.fuzz.fuzz parsers --count 1000000 --db ../mondrian/mondrian.db
    python -m tests.fuzz.fuzz databases --count 200         # flipped bytes in a database, through the whole of linking
    python -m tests.fuzz.fuzz rows --count 500              # hand-damaged rows of each file, through each script

Exit code 1, with the input (cut short) and its seed, when something broke; the same --seed gives the same inputs.
"""

import json
import random
import sqlite3
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import click

from common.data.linking import prompt_of
from common.data.sources import AnalysisFiles, asked_by, find_analysis
from integration.lora_patch.analysis import AnalysisError, parse_lenient
from integration.lora_patch.prompts import DEFAULT_SYSTEM_PROMPT, UnreadablePrompt, read_specification
from tests.data.test_html_analysis import CARDS, page
from tests.fuzz import damage
from tests.mondrian_case import HTML_PROMPT, SYSTEM_PROMPT, Tree, analysis

SLOW = 1.0  # seconds of CPU that no input may take
ASKED = asked_by((SYSTEM_PROMPT,), None)


def seeds(db: Path | None) -> list[str]:
    """Return answers and prompts of every era; with a database, its own."""
    objects = [analysis(i) for i in (1, 2)]
    found = [SYSTEM_PROMPT, HTML_PROMPT, DEFAULT_SYSTEM_PROMPT, page(CARDS), page(CARDS).replace("</p>", "")]
    found += [json.dumps(value, indent=i) for i, value in enumerate(objects)]
    found += [
        f"# Ansel\n\n## Summary\nA ridge.\n\n## Full Analysis\n{found[-1]}",
        f"<think>Hm.</think>```json\n{found[-1]}\n```",
    ]
    found += [
        json.dumps({"dimensional_analysis": {d["name"]: d for d in objects[0]["dimensions"]}, "overall_grade": "8/10"})
    ]
    found += [json.dumps({"prompt": SYSTEM_PROMPT, "response": found[5]}), "user\nJudge.\nassistant\n" + found[6]]
    if db:
        with sqlite3.connect(f"file:{db}?immutable=1", uri=True) as connection:
            for column in ("analysis_markdown", "llm_outputs", "prompt"):
                found += [row[0] for row in connection.execute(f"SELECT {column} FROM jobs") if isinstance(row[0], str)]
    return [text for text in dict.fromkeys(found) if text]


def through_parsers(text: str, every: bool = True) -> None:
    """Hand a text to what reads answers, and with ``every`` to what reads prompts too; raises what it should not."""
    job = {"id": "one", "analysis_markdown": text, "analysis_file": text[:1000], "llm_outputs": None, "prompt": ""}
    if every:
        job |= {"analysis_markdown": text[:300], "llm_outputs": text, "prompt": text[:4000]}
    try:
        find_analysis(job, "ansel", AnalysisFiles(None), ASKED)
    except AnalysisError as error:
        if error.reason == "unread":
            raise AssertionError(error.detail) from error
    parse_lenient(text)
    if every:
        ASKED_SPECIFICATION.check(text)
        prompt_of({"prompt": None, "llm_prompt": None, "llm_outputs": text})
        try:
            specification = read_specification.__wrapped__(text)
            specification.check(text)
            specification.lacking(analysis(1))
        except UnreadablePrompt:
            pass


ASKED_SPECIFICATION = read_specification(SYSTEM_PROMPT)


def fuzz_parsers(texts: list[str], seed: int, count: int | None, seconds: float | None) -> tuple[int, float]:
    """Return (inputs tried, CPU seconds of the slowest); AssertionError shows the input that broke a parser."""
    dice = random.Random(seed)
    tried, slowest, ends = 0, 0.0, time.monotonic() + (seconds or 1e9)
    while tried < (count or sys.maxsize) and time.monotonic() < ends:
        text = damage.mutated(dice, texts)
        started = time.process_time()
        try:
            through_parsers(text, tried % 4 == 0)
        except Exception as error:
            raise AssertionError(f"input {tried} of seed {seed}: {text[:2000]!r}") from error
        took = time.process_time() - started
        assert took < SLOW, f"input {tried} of seed {seed} took {took:.1f} s: {len(text):,} characters, {text[:300]!r}"
        tried, slowest = tried + 1, max(slowest, took)
        if tried % 100_000 == 0:
            click.echo(f"{tried:,} inputs, slowest {slowest:.2f} s", err=True)
    return tried, slowest


def fuzz_databases(folder: Path, seed: int, count: int) -> Counter:
    """Return how often linking a database with flipped bytes ended with which exit code; AssertionError for others."""
    tree = Tree(folder)
    tree.good(6)
    tree.job("html", "photo-1.jpg", page(CARDS))
    for i in range(30):
        tree.job(f"more-{i}", "photo-2.jpg", analysis(i), llm_outputs=json.dumps({"response": "x" * 2000}))
    tree.connection.close()
    path, whole = folder / "mondrian.db", (folder / "mondrian.db").read_bytes()
    dice, codes = random.Random(seed), Counter()
    for i in range(count):
        path.write_bytes(damage.flipped(dice, whole))
        codes[_ended(tree.link, f"database {i} of seed {seed}")] += 1
    path.write_bytes(whole)
    assert tree.link().exit_code == 0
    return codes


def _ended(run: Callable, what: str) -> int:
    """Run a script; AssertionError unless it ended well, or in an error told in few lines."""
    result = run()
    if result.exception and not isinstance(result.exception, SystemExit):
        shown = "".join(traceback.format_exception(result.exception)[-6:])
        raise AssertionError(f"{what}: {shown}")
    assert result.exit_code in (0, 1, 3), f"{what}: exit code {result.exit_code}\n{result.output[-2000:]}"
    return result.exit_code


def fuzz_rows(folder: Path, seed: int, count: int) -> dict[str, Counter]:
    """Return {file: how often its readers ended with which exit code} for ``count`` damaged versions of each file."""
    dice = random.Random(seed)
    return {
        name: Counter(_ended(run, f"{name} {i} of seed {seed}") for i in range(count) if write(dice) is None)
        for name, write, run in damage.files(folder)
    }


@click.group(help=__doc__.split("\n\n")[0])
def main():
    pass


@main.command()
@click.option("--seconds", type=float)
@click.option("--count", type=int)
@click.option("--seed", default=1, show_default=True)
@click.option("--db", type=click.Path(path_type=Path), multiple=True)
def parsers(seconds, count, seed, db):
    """Mutated answers and prompts."""
    texts = [text for path in db or (None,) for text in seeds(path)]
    tried, slowest = fuzz_parsers(texts, seed, count, seconds or (None if count else 60))
    click.echo(
        f"{tried:,} inputs of {len(texts):,} seeds: none broke a parser, the slowest took {slowest:.2f} s of CPU"
    )


@main.command()
@click.option("--count", default=200, show_default=True)
@click.option("--seed", default=1, show_default=True)
def databases(count, seed):
    """Databases with flipped bytes."""
    with tempfile.TemporaryDirectory() as folder:
        codes = fuzz_databases(Path(folder), seed, count)
    click.echo(f"{count:,} databases: no traceback; exit codes {dict(sorted(codes.items()))}")


@main.command()
@click.option("--count", default=500, show_default=True, help="damaged versions of each file")
@click.option("--seed", default=1, show_default=True)
def rows(count, seed):
    """Hand-damaged rows."""
    with tempfile.TemporaryDirectory() as folder:
        for name, codes in fuzz_rows(Path(folder), seed, count).items():
            click.echo(f"{name}: {count:,} versions, no traceback; exit codes {dict(sorted(codes.items()))}")


if __name__ == "__main__":
    main()
