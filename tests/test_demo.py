"""The sample is what it says it is, and the four scripts run on it one after another as the README types them."""

import importlib
import json
import re
import sqlite3
from pathlib import Path

import click
import pytest
import yaml
from PIL import Image

from integration.lora_patch.fingerprint import base_fingerprint, compare_fingerprints
from integration.lora_patch.photo import load_photo
from tests.sample import scenes
from tests.sample.demo import FIGURES, Demo, new_scene
from tests.sample.make_tree import make_tree, sample_prompt

ROOT = Path(__file__).resolve().parents[1]


def test_the_four_scripts_write_what_is_documented(worked):
    folder, _ = worked
    written = [
        "training_data/training_data_manifest.jsonl",
        "training_data/training_data_ansel_train.jsonl",
        "training_data/training_data_ansel_val.jsonl",
        "training_data/training_data_ansel_meta.json",
        "models/qwen3-vl-4b-lora-ansel/adapter_config.json",
        "models/qwen3-vl-4b-lora-ansel/adapter_model.safetensors",
        "models/qwen3-vl-4b-lora-ansel/training_args.json",
        "models/qwen3-vl-4b-lora-ansel/training_log.jsonl",
        "models/qwen3-vl-4b-lora-ansel/config.yaml",
        "training_data/training_data_manifest_config.yaml",
        "training_data/training_data_ansel_config.yaml",
        "evaluation/comparison_report_config.yaml",
        "evaluation/comparison_report.json",
        "evaluation/comparison_report.html",
    ]
    assert [name for name in written if not (folder / name).is_file()] == []


@pytest.mark.parametrize(
    ("script", "config"),
    [
        ("link_training_data", "training_data/training_data_manifest_config.yaml"),
        ("prepare_training_data", "training_data/training_data_ansel_config.yaml"),
        ("train_mlx_lora", "models/qwen3-vl-4b-lora-ansel/config.yaml"),
        ("evaluate_lora", "evaluation/comparison_report_config.yaml"),
    ],
)
def test_the_options_that_a_run_wrote_are_taken_again(worked, script, config):
    command = importlib.import_module(script).main
    context = command.make_context(script, ["--config", str(worked[0] / config)])
    written = yaml.safe_load((worked[0] / config).read_text(encoding="utf-8"))
    assert len(written) >= 7
    for param in command.params:
        name = max(param.opts, key=len).lstrip("-")
        if name in written:
            value = context.params[param.name]
            plain = [str(part) for part in value] if isinstance(value, tuple) else value
            assert str(plain) in (str(written[name]), f"{written[name]}.0")


def test_every_job_of_the_sample_is_linked_or_has_its_reason(worked):
    folder, _ = worked
    manifest = (folder / "training_data/training_data_manifest.jsonl").read_text().splitlines()
    jobs = sqlite3.connect(folder / "mondrian.db").execute("SELECT status FROM jobs WHERE advisor = 'ansel'").fetchall()
    # 60 photographs, every twelfth of them judged twice; ten jobs of ansel are damaged
    assert len(manifest) == 60 + 5
    assert len(jobs) == 60 + 5 + 10


def test_a_photograph_never_stands_on_both_sides(worked):
    folder, _ = worked
    sides = [
        {
            json.loads(line)["image_sha256"]
            for line in (folder / f"training_data/training_data_ansel_{side}.jsonl").open()
        }
        for side in ("train", "val")
    ]
    assert len(sides[0]) + len(sides[1]) == 60 and not sides[0] & sides[1]


def test_training_lowers_the_loss_on_held_out_photographs(worked):
    folder, _ = worked
    report = json.loads((folder / "evaluation/comparison_report.json").read_text())
    base, tuned = (report["summary"]["arms"][arm]["loss.nats"]["value"] for arm in ("base", "candidate"))
    assert tuned < base - 0.5


def test_the_demo_tells_the_figures_and_what_was_said_of_the_new_photograph(worked, capsys):
    folder, _ = worked
    demo = Demo(folder)
    demo.report = folder / "evaluation/comparison_report.json"
    critique = scenes.critique(new_scene())
    demo.show([critique | {"used": "fine_tuned"}, critique | {"overall_score": 9.9, "used": "base"}])
    told = capsys.readouterr().out
    assert all(title in told for _, title, _ in FIGURES)
    assert "  base     overall 9.9, lighting" in told
    assert f"  advisor  overall {critique['overall_score']}, lighting" in told
    assert "make train eval ADVISOR=ansel MONDRIAN=path/to/mondrian" in told
    lines = told.replace(str(folder), "demo").splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) < 24


def test_a_failed_step_of_the_demo_shows_the_end_of_its_log(tmp_path):
    demo = Demo(tmp_path)
    with pytest.raises(click.ClickException) as error:
        demo.run("link", str, ("-c", "print('no database here'); raise SystemExit(1)"))
    assert f"step 1 failed; {tmp_path}/logs/1-link.log ends with\nno database here" in error.value.message


# -- the sample tree --------------------------------------------------------------------------------------------------


def test_a_tree_is_made_alike_from_its_seed(tmp_path):
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        make_tree(tmp_path / name, photos=6, long_side=96, seed=seed)

    def content(name: str) -> dict:
        folder = tmp_path / name
        files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.jpg")}
        files |= {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.md")}
        return files | {"jobs": sqlite3.connect(folder / "mondrian.db").execute("SELECT * FROM jobs").fetchall()}

    assert content("one") == content("again")
    assert content("one") != content("other")


def test_the_tree_has_the_tables_and_the_journal_of_a_real_one(sample_tree):
    connection = sqlite3.connect(f"file:{sample_tree / 'mondrian.db'}?mode=ro", uri=True)
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert {"jobs", "advisors", "config"} <= tables
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert len(connection.execute("PRAGMA table_info(jobs)").fetchall()) == 33


def test_some_photographs_lie_on_their_side_until_their_orientation_is_applied(sample_tree):
    turned = [path for path in (sample_tree / "source").rglob("photo-*.jpg") if orientation(path) == 6]
    assert turned
    for path in turned:
        with Image.open(path) as stored:
            assert stored.width > stored.height
        upright = load_photo(path)
        assert upright.width < upright.height


def orientation(path: Path) -> int | None:
    try:
        with Image.open(path) as picture:
            return picture.getexif().get(0x0112)
    except OSError:  # the web page that is called .jpg
        return None


def test_a_brighter_picture_scores_higher_for_its_light():
    dark = scenes.Scene("lake", 0.1, 0.5, 0.5, 0.4, 2, False, 7)
    bright = scenes.Scene("lake", 0.9, 0.5, 0.5, 0.4, 2, False, 7)
    brightness = [sum(scenes.draw(scene, 64).convert("L").tobytes()) for scene in (dark, bright)]
    lighting = [dict(zip(scenes.DIMENSIONS, scenes.scores(scene), strict=True))["Lighting"] for scene in (dark, bright)]
    assert brightness[0] < brightness[1] and lighting[0] < lighting[1]


# -- the tiny model ---------------------------------------------------------------------------------------------------


def test_the_tiny_model_loads_as_qwen3_vl_and_answers(tiny_base, tmp_path):
    from mlx_vlm import generate, load
    from mlx_vlm.prompt_utils import apply_chat_template

    model, processor = load(str(tiny_base))
    assert type(model).__module__ == "mlx_vlm.models.qwen3_vl.qwen3_vl"
    prompt = apply_chat_template(processor, model.config, sample_prompt("ansel"), num_images=1)
    assert prompt.startswith(
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>You are a photography critic."
    )
    assert prompt.endswith("Analyze the provided image.<|im_end|>\n<|im_start|>assistant\n")
    scenes.draw(scenes.Scene("boat", 0.5, 0.5, 0.5, 0.5, 2, False, 1), 64).save(tmp_path / "boat.png")
    result = generate(model, processor, prompt, image=[str(tmp_path / "boat.png")], max_tokens=3, verbose=False)
    assert result.generation_tokens == 3


def test_the_tokenizer_returns_every_text_and_knows_qwens_special_tokens(tiny_base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    config = json.loads((tiny_base / "config.json").read_text())
    text = 'Ünïcode 測光 {"score":10,"overall_score":7.4}\n<|im_start|>'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == config["image_token_id"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer) == config["text_config"]["vocab_size"]


def test_a_model_is_made_alike_from_its_seed_and_told_apart_from_another(make_tiny_model, tiny_base, tmp_path):
    again, other = make_tiny_model(tmp_path / "again"), make_tiny_model(tmp_path / "other", "--seed", "1")
    names = sorted(path.name for path in tiny_base.iterdir())
    assert [name for name in names if (again / name).read_bytes() != (tiny_base / name).read_bytes()] == []
    errors, _ = compare_fingerprints(base_fingerprint(tiny_base, "one"), base_fingerprint(other, "other"))
    assert errors


def test_the_readme_shows_what_the_demo_prints():
    """Step by step and figure by figure; numbers are those of one run."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(block for block in re.findall(r"```\n(.*?)```", text, re.S) if block.startswith("The pipeline on a"))
    code = (ROOT / "tests/sample/demo.py").read_text(encoding="utf-8")
    steps = re.findall(r'(?:self\.run\(\s*|self\._answer\(service, )"([a-z ]+)"', code)
    assert re.findall(r"^  \d ([a-z]+(?: [a-z]+)?) ", block, re.M) == steps
    assert [line.strip() for line in re.findall(r"^  (\D.{45}) ", block, re.M)] == [title for _, title, _ in FIGURES]
