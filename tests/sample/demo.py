"""The whole way on a sample: analyses in a database, an adapter, its evaluation, service and rollback, in minutes.

    python tests/sample/demo.py --folder demo

Makes a small Mondrian tree and a tiny Qwen3-VL (a million parameters, pre-trained for a minute), runs the four scripts
on them, puts the adapter in use, lets the stand-in of the service answer to a photograph that is not in the sample,
and takes the adapter back. One line for each step; all that a step printed is in demo/logs/. Exit code 0 when the
adapter was promoted, served and taken back.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

ADVISOR = "ansel"
PRETRAIN_STEPS, EPOCHS, LEARNING_RATE = 600, 6, "3e-3"
NEW_PHOTO_SEED = 2026
FIGURES = (
    ("format.strict", "answers in the service's format", "{:.0%}"),
    ("scores.mae", "mean error of the scores, points of 10", "{:.2f}"),
    ("overall.mae", "mean error of the overall score", "{:.2f}"),
    ("text.comments", "comments like the advisor's (chrF, 0 to 100)", "{:.0f}"),
    ("loss.nats", "validation loss", "{:.2f}"),
)


class Demo:
    """The demo's folder, and the steps that fill it."""

    def __init__(self, folder: Path):
        self.folder, self.step = folder, 0
        self.tree, self.base, self.models = folder / "mondrian", folder / "base", folder / "models"
        self.data, self.photo = folder / "training_data", folder / "photo.jpg"
        self.adapter = self.models / f"qwen3-vl-4b-lora-{ADVISOR}"
        self.report = folder / "evaluation" / ADVISOR / "comparison_report.json"
        self.manifest = self.data / f"training_data_{ADVISOR}_manifest.jsonl"
        (folder / "logs").mkdir(parents=True, exist_ok=True)

    def run(self, title: str, told: Callable[[], str], *commands: tuple, codes: tuple[int, ...] = (0,)) -> None:
        """Run commands, their output into a log; print the step's title and, when it has ended, what came of it."""
        self.step += 1
        click.echo(f"  {self.step} {title:<12}", nl=False)
        log, started = self.folder / "logs" / f"{self.step}-{title.split()[0]}.log", time.monotonic()
        with open(log, "w", encoding="utf-8") as file:
            for command in commands:
                words = [sys.executable, *(str(word) for word in command)]
                done = subprocess.run(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment())
                if done.returncode not in codes:
                    last = log.read_text(encoding="utf-8").replace("\r", "\n").splitlines()[-15:]
                    raise click.ClickException("\n".join([f"step {self.step} failed; {log} ends with", *last]))
        click.echo(f"{told():<70}{time.monotonic() - started:4.0f} s")

    def make_sample(self) -> None:
        weights = self.base / "model.safetensors"
        made = weights.stat().st_mtime if weights.is_file() else 0
        if made > max(path.stat().st_mtime for path in Path(__file__).parent.glob("*.py")):
            return
        for name in ("base", "mondrian", "models", "evaluation", "training_data"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.run(
            "sample",
            lambda: "a Mondrian tree of drawn photographs, a tiny Qwen3-VL to start from",
            ("tests/sample/make_tree.py", "--output_dir", self.tree),
            ("tests/sample/make_tiny_model.py", "--output_dir", self.base, "--pretrain_steps", PRETRAIN_STEPS),
        )

    def train(self) -> None:
        """Database to adapter."""
        self.run("link", self._linked, (
            "link_training_data.py", "--advisor", ADVISOR, "--db_path", self.tree, "--output_dir", self.data,
            "--output_file", self.manifest.name,
        ))  # fmt: skip
        self.run("prepare", self._prepared, (
            "prepare_training_data.py", "--manifest", self.manifest, "--output_dir", self.data,
            "--base_model", self.base,
        ))  # fmt: skip
        self.run("train", self._trained, (
            "train_mlx_lora.py", "--train_data", self.data / f"training_data_{ADVISOR}_train.jsonl",
            "--base_model", self.base, "--output_dir", self.adapter, "--resume",
            "--epochs", EPOCHS, "--learning_rate", LEARNING_RATE,
        ))  # fmt: skip

    def release(self) -> None:
        """Adapter to service and back; the same photograph is answered with the adapter and, after it, without."""
        versions = ("-m", "common.release.versions")
        of = ("--advisor", ADVISOR, "--work", self.folder)
        shutil.rmtree(self.report.parent, ignore_errors=True)
        self.run("evaluate", self._evaluated, (
            "evaluate_lora.py", "--lora_path", self.adapter, "--output_report", self.report, "--timing_seconds", 20,
        ), codes=(0, 3, 4))  # fmt: skip
        self.run("promote", lambda: "v1 is in use", (*versions, "promote", *of))
        with self._service() as service:
            answers = [self._answer(service, "serve", "lora_patch answers one request with the adapter")]
            self.run("roll back", lambda: "the base alone is in use", (*versions, "rollback", *of))
            service.post("/lora/reload")
            answers.append(self._answer(service, "serve again", "the same request, answered by the base"))
        self.show(answers)

    def _service(self):
        from tests.sample import scenes
        from tests.standin.running import STANDIN, RunningService

        scenes.draw(new_scene(), 480).save(self.photo, quality=90)
        shutil.rmtree(self.folder / "service", ignore_errors=True)
        flags = ("--mlx_model", self.base, "--lora_path", self.models / ADVISOR / "deployed.json")
        flags = tuple(str(flag.resolve()) if isinstance(flag, Path) else flag for flag in flags)
        database = self.tree / "mondrian.db"
        return RunningService(self.folder / "service", STANDIN, database, *flags, "--model_mode", "fine_tuned")

    def _answer(self, service, title: str, told: str) -> dict:
        self.step += 1
        click.echo(f"  {self.step} {title:<12}", nl=False)
        started = time.monotonic()
        headers, body = service.wait().analyze(self.photo, ADVISOR, f"demo-{self.step}")
        click.echo(f"{told:<70}{time.monotonic() - started:4.0f} s")
        return {"used": headers["X-Model-Used"], **body["analysis"]}

    # -- what each step tells ----------------------------------------------------------------------------------------

    def _linked(self) -> str:
        rejected = self.manifest.with_name(f"{self.manifest.stem}_rejected.jsonl")
        return f"{lines(self.manifest)} analyses with their photographs, {lines(rejected)} jobs left out with reasons"

    def _prepared(self) -> str:
        train, val = (lines(self.data / f"training_data_{ADVISOR}_{side}.jsonl") for side in ("train", "val"))
        return f"{train} photographs to train on, {val} held out"

    def _trained(self) -> str:
        result = read(self.adapter / "training_args.json")["result"]
        return f"{result['steps']} steps, {result['trainable_parameters']:,} parameters"

    def _evaluated(self) -> str:
        report = read(self.report)
        counts = Counter(gate["verdict"] for gate in report["gates"])
        return "gates: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())

    def show(self, answers: list[dict]) -> None:
        """Print the figures, and what both said of the photograph, beside what the sample's advisor says of it."""
        from tests.sample import scenes

        report = read(self.report)
        base, tuned = (report["summary"]["arms"][arm] for arm in ("base", "candidate"))
        click.echo(f"\n{'On the held-out photographs':48}{'base':>8}{'tuned':>8}")
        for name, title, form in FIGURES:
            values = [arm[name]["value"] for arm in (base, tuned)]
            shown = ("-" if value is None else form.format(value) for value in values)
            click.echo(f"  {title:46}" + "".join(f"{value:>8}" for value in shown))
        click.echo(f"\n{self.photo}, which is not in the sample, in the service")
        said = {"base": answers[1], "tuned": answers[0], "advisor": scenes.critique(new_scene())}
        for name, answer in said.items():
            light = next(row for row in answer["dimensions"] if row["name"] == "Lighting")
            click.echo(f"  {name:8} overall {answer['overall_score']}, lighting {light['score']}: {light['comment']}")
        page = self.report.with_suffix(".html")
        card = self.data / f"training_data_{ADVISOR}_card.html"
        click.echo(f"\nOpen {page} and\n{card}; what each step printed is in {self.folder}/logs/.")
        click.echo(f"Next:\n  make try PHOTO={self.photo} WORK={self.folder}")
        click.echo("  make train eval ADVISOR=ansel MONDRIAN=path/to/mondrian      # your own data")


def new_scene():
    """Return the photograph that everybody is asked about; it is not in the sample."""
    from tests.sample import scenes

    return scenes.random_scene(random.Random(NEW_PHOTO_SEED))


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> int:
    with open(path, encoding="utf-8") as file:
        return sum(1 for _ in file)


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default="demo", help="where everything is written")
def main(folder: Path) -> None:
    """Run the whole pipeline on a sample."""
    started = time.monotonic()
    demo = Demo(folder)
    click.echo(f"The pipeline on a sample, in {folder}/ (about three minutes on two cores)")
    demo.make_sample()
    demo.train()
    demo.release()
    click.echo(f"\nThe demo ran through in {time.monotonic() - started:.0f} s.")


if __name__ == "__main__":
    main()
