"""evaluate_lora.py on a tiny model: adapters whose right verdict is known, interruption, and what must be refused."""

import json
import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.evaluation import model_source, setup
from common.evaluation.gates import load_gates, undecided_speed
from common.evaluation.generations import Item, OutputLog
from common.files import read_json, write_json, write_jsonl
from evaluate_lora import time_arms
from integration.lora_patch.specification import PromptSpecification
from tests.evaluation_case import evaluate, make_adapter, make_data, read_jsonl

QUICK = ("--max_tokens", 20, "--timing_examples", 0)
LOSS_ALONE = "".join(
    f"[{name}]\nenabled = false\n" for name in ("base_format", "tuned_format", "inference_time", "overhead")
)


@pytest.fixture(scope="module")
def case(tiny_base, tmp_path_factory):
    """A folder with held-out data and three adapters: of zeros, a sabotaged one and a better one."""
    folder = tmp_path_factory.mktemp("evaluation")
    data, models = make_data(folder), folder / "models"
    zeros = make_adapter(models / "qwen3-vl-4b-lora-ansel", tiny_base, data)
    sabotaged = make_adapter(models / "qwen3-vl-4b-lora-ansel-v2", tiny_base, data, climb=3.0)
    better = make_adapter(models / "qwen3-vl-4b-lora-ansel-v3", tiny_base, data, climb=-3.0)
    gates = folder / "gates.toml"
    gates.write_text(LOSS_ALONE)
    made = {"zeros": zeros, "sabotaged": sabotaged, "better": better}
    return made | {"folder": folder, "gates": gates, "data": data, "base": tiny_base}


def report_of(case: dict, name: str, *arguments: object) -> tuple:
    out = case["folder"] / "out" / f"{name}.json"
    result = evaluate(*arguments, "--output_report", out, *QUICK)
    return result, read_json(out)


def test_adapter_of_zeros_comes_out_as_no_difference(case):
    result, report = report_of(case, "zeros", "--lora_path", case["zeros"], "--gates", case["gates"])
    assert result.exit_code == 0, result.output
    comparison = report["verdict"]["comparisons"][0]
    assert comparison["finding"] == "no difference"
    assert comparison["same_outputs"] == [10, 10]
    assert report["summary"]["differences"]["candidate-base"]["loss.nats"]["value"] == 0.0
    assert "No difference: candidate and base gave the same outputs on all 10 photographs" in result.stdout
    card = (case["zeros"] / "README.md").read_text()
    assert card.startswith("# card\n") and card.endswith("end\n") and "No difference" in card


def test_sabotaged_adapter_fails(case):
    result, report = report_of(case, "sabotaged", "--lora_path", case["sabotaged"], "--gates", case["gates"])
    assert result.exit_code == 4
    assert "fail          Validation loss not worse than the base's" in result.stdout
    assert "What would help:\n  Validation loss not worse than the base's: a lower learning rate" in result.stdout
    assert "Do not promote" in result.stdout
    assert report["verdict"]["comparisons"][0]["finding"] == "worse"


def test_better_adapter_is_found_better(case):
    result, report = report_of(case, "better", "--lora_path", case["better"], "--gates", case["gates"])
    assert result.exit_code == 0
    assert report["verdict"]["comparisons"][0]["finding"] == "better"
    assert report["summary"]["differences"]["candidate-base"]["loss.nats"]["high"] < 0


def test_deployed_adapter_is_the_third_arm(case):
    arguments = ("--lora_path", case["sabotaged"], "--gates", case["gates"], "--deployed", case["zeros"])
    result, report = report_of(case, "three", *arguments)
    assert list(report["arms"]) == ["base", "candidate", "deployed"]
    failed = {row["name"] for row in report["gates"] if row["verdict"] == "fail"}
    assert failed == {"base_loss", "deployed_loss"}
    assert result.exit_code == 4


def test_losses_are_those_of_mlx_vlms_plain_forward(case):
    import mlx.core as mx

    from integration.lora_patch import vlm
    from integration.lora_patch.photo import load_photo

    _, report = report_of(case, "zeros", "--lora_path", case["zeros"], "--gates", case["gates"])
    base, row = vlm.load_base(case["base"]), read_jsonl(case["data"][1])[0]
    encoded = vlm.encode(base, row["prompt"], [load_photo(row["image_path"], 128)], row["response"])
    inputs, grid = mx.array(encoded.input_ids)[None], mx.array(encoded.image_grid_thw)
    logits = base.model(inputs, mx.array(encoded.pixel_values), image_grid_thw=grid).logits[0, :-1]
    chosen = mx.take_along_axis(logits - mx.logsumexp(logits, -1, keepdims=True), inputs[0, 1:, None], -1)[:, 0]
    mask = mx.array(encoded.completion_mask[1:])
    expected = -float((chosen * mask).sum())
    found = report["examples"][0]["loss"]["base"]
    assert found["tokens"] == int(encoded.completion_mask.sum())
    assert found["sum"] == pytest.approx(expected, rel=1e-5)


def test_timing_is_measured_in_turn_and_one_at_a_time(case):
    out = case["folder"] / "out" / "timed.json"
    arguments = ("--lora_path", case["zeros"], "--max_tokens", 6, "--timing_examples", 5, "--max_examples", 5)
    evaluate(*arguments, "--timing_seconds", 0, "--output_report", out)
    report = read_json(out)
    assert [row["arm"] for row in report["timings"]] == (["base", "candidate"] + ["candidate", "base"]) * 2 + [
        "base",
        "candidate",
    ]
    assert all(0 < row["first_token_seconds"] <= row["seconds"] and row["peak_bytes"] > 0 for row in report["timings"])
    assert report["verdict"]["one_by_one"] == [10, 10]
    arms = report["summary"]["arms"]
    assert arms["candidate"]["speed.seconds"]["n"] == 5 and arms["candidate"]["speed.load_seconds"]["value"] > 0
    verdicts = {row["name"]: row["verdict"] for row in report["gates"]}
    assert verdicts["inference_time"] == "pass" and verdicts["tuned_format"] == "fail"


class Clocked:
    """A source whose timed runs take a noisy time about ``seconds``; counts the photographs timed."""

    arms = ["base", "candidate"]

    def __init__(self, overhead: float):
        self.overhead, self.asked, self.rng = overhead, [], random.Random(1)

    def timings(self, items):
        for item in items:
            self.asked.append(item)
            for arm, seconds in (("base", 1.0), ("candidate", 1.0 + self.overhead)):
                noisy = seconds * self.rng.uniform(0.85, 1.15)
                times = {"seconds": noisy, "first_token_seconds": 0.1 * noisy, "tokens": 100}
                yield {"kind": "timing", "arm": arm, "example": item, **times}


@pytest.mark.parametrize(("overhead", "decided"), [(0.05, True), (0.18, True), (0.1, False)])
def test_timing_repeats_until_the_gates_are_decided_or_the_time_is_spent(overhead, decided, monkeypatch):
    options = SimpleNamespace(from_outputs=None, timing_examples=8, timing_seconds=150)
    source, gates = Clocked(overhead), load_gates(None)
    monkeypatch.setattr(time, "monotonic", lambda: float(len(source.asked)))  # a photograph a second
    rows = time_arms(source, list(range(20)), SimpleNamespace(options=options), gates)
    assert source.asked[: min(20, len(source.asked))] == list(range(20))[: len(source.asked)]  # new photographs first
    assert undecided_speed(gates, rows, source.arms) != decided
    assert (8 < len(source.asked) < 150) if decided else 150 <= len(source.asked) < 170


def test_constrained_run_stands_beside_the_free_one(case):
    out = case["folder"] / "out" / "grammar.json"
    arguments = ("--lora_path", case["zeros"], "--max_tokens", 12, "--timing_examples", 1, "--max_examples", 2)
    evaluate(*arguments, "--constrained", "--output_report", out)
    report = read_json(out)
    assert list(report["arms"]) == ["base", "candidate", "base+grammar", "candidate+grammar"]
    bound = [example["outputs"]["base+grammar"][0]["text"] for example in report["examples"]]
    assert all('{"image_description":"'.startswith(text[:22]) for text in bound)
    assert "speed.seconds" in report["summary"]["ratios"]["candidate+grammar/candidate"]


def test_sampled_evaluation_is_seeded(case):
    arguments = ("--lora_path", case["zeros"], "--num_samples", 2, "--temperature", 1.0, "--max_examples", 2, "--fresh")
    texts = []
    for seed in (1, 1, 2):
        _, report = report_of(case, "sampled", *arguments, "--seed", seed)
        texts.append([[o["text"] for o in example["outputs"]["base"]] for example in report["examples"]])
    assert texts[0] == texts[1] != texts[2]
    assert all(len(set(samples)) == 2 for samples in texts[0])


def test_interrupted_evaluation_resumes_where_it_stopped(case, monkeypatch, tmp_path):
    arguments = ("--lora_path", case["sabotaged"], "--gates", case["gates"], *QUICK, "--batch_size", 2)
    whole = evaluate(*arguments, "--output_report", tmp_path / "whole" / "report.json")
    assert whole.exit_code == 4
    asked, outputs = [], model_source.ModelSource.outputs

    def broken(self, arm, items, samples):
        asked.append((arm, len(items)))
        for number, row in enumerate(outputs(self, arm, items, samples)):
            if broken.limit is not None and number == broken.limit:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(model_source.ModelSource, "outputs", broken)
    broken.limit = 3
    out = tmp_path / "part" / "report.json"
    evaluate(*arguments, "--output_report", out)
    assert not out.exists() and asked == [("base", 8)]
    log = next((tmp_path / "part" / "generations").glob("base-*.jsonl"))
    with open(log, "a") as file:
        file.write('{"kind": "output", "arm": "ba')  # and the machine died in mid-write
    broken.limit = None
    asked.clear()
    evaluate(*arguments, "--output_report", out)
    assert asked == [("base", 5), ("candidate", 8), ("base", 2), ("candidate", 2)]
    again, first = read_json(out), read_json(tmp_path / "whole" / "report.json")
    assert again["examples"] == first["examples"]
    assert again["summary"]["differences"] == first["summary"]["differences"]
    asked.clear()
    evaluate(*arguments, "--output_report", out)
    assert {number for _, number in asked} == {0}


@pytest.mark.parametrize("damage", ["nonsense", "5", '{"kind": "output", "key": "k"}', '{"kind": [], "key": "k"}'])
def test_rows_of_the_log_after_a_damaged_one_are_made_again(tmp_path, damage):
    log = OutputLog(tmp_path, "base", {"max_tokens": 1})
    row = {"kind": "loss", "arm": "base", "example": 0, "key": "k", "sum": 1.0, "tokens": 2}
    with open(log.path, "a") as file:
        file.write("\n".join([json.dumps(row), damage, json.dumps(row | {"key": "l"})]) + "\n")
    assert list(OutputLog(tmp_path, "base", {"max_tokens": 1}).rows) == [("loss", "k", 0)]


def test_log_of_other_settings_is_not_used(tmp_path):
    log = OutputLog(tmp_path, "base", {"max_tokens": 1})
    assert OutputLog(tmp_path, "base", {"max_tokens": 2}).path != log.path
    log.path.write_text('{"settings": {"max_tokens": 3}}\n{"kind": "output", "key": "k", "sample": 0}\n')
    assert OutputLog(tmp_path, "base", {"max_tokens": 1}).rows == {}


def test_hyphenated_flags_and_base_by_name(case):
    out = case["folder"] / "hyphens"
    given = ("--lora-path", case["zeros"], "--base-model", case["base"], "--val-data", case["data"][1])
    result = evaluate(
        *given, "--output-report", f"{out}/", "--max-examples", 1, "--max-tokens", 4, "--timing-examples", 0
    )
    assert result.exit_code == 3
    assert (out / "comparison_report.json").is_file() and (out / "comparison_report.html").is_file()
    assert "not measured" in result.stdout


# -- refused ----------------------------------------------------------------------------------------------------------


def refused(case: dict, *arguments: object) -> str:
    """Run an evaluation that must be refused: exit code 1, one error, no report; returns the error."""
    out = case["folder"] / "refused" / "report.json"
    result = evaluate("--output_report", out, *QUICK, *arguments)
    assert result.exit_code == 1
    assert result.stderr.count("Error:") == 1
    assert not out.exists()
    return result.stderr


def changed(case: dict, tmp_path: Path, **fields) -> Path:
    """Return a copy of the adapter of zeros whose training_args.json says something else."""
    folder = tmp_path / "qwen3-vl-4b-lora-ansel"
    shutil.copytree(case["zeros"], folder)
    write_json(folder / "training_args.json", read_json(folder / "training_args.json") | fields)
    return folder


def test_trained_photographs_are_refused_with_the_list(case, tmp_path):
    rows = [*read_jsonl(case["data"][1])[:2], *read_jsonl(case["data"][0])]
    # the same bytes under another name and with another hash in the row: the content decides
    copy = tmp_path / "renamed.jpg"
    copy.write_bytes(Path(rows[2]["image_path"]).read_bytes())
    rows[2] = rows[2] | {"image_path": str(copy), "image_sha256": "0" * 64}
    write_jsonl(tmp_path / "val.jsonl", rows)
    error = refused(case, "--lora_path", case["zeros"], "--val_data", tmp_path / "val.jsonl")
    assert error.count("was trained on this photograph") == 3
    assert f"{tmp_path / 'val.jsonl'}:3: {copy}" in error


def test_other_base_is_refused_with_both_names(case, tmp_path, make_tiny_model):
    other = make_tiny_model(tmp_path / "other-base", "--seed", "7")
    error = refused(case, "--lora_path", case["zeros"], "--base_model", other)
    assert "same shape but other weights" in error and str(other) in error and str(case["base"]) in error


def test_adapter_that_is_no_number_or_no_fit_is_refused(case, tmp_path, tiny_base):
    broken = make_adapter(tmp_path / "nan", tiny_base, case["data"], b_scale=float("nan"))
    error = refused(case, "--lora_path", broken)
    assert "lora_b holds NaN or infinity (and 13 more)" in error


def test_missing_and_damaged_inputs_are_one_line_each(case, tmp_path):
    assert "no such adapter folder" in refused(case, "--lora_path", tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no adapter there" in refused(case, "--lora_path", empty)
    folder = changed(case, tmp_path, base_model=None)
    assert "give --base_model" in refused(case, "--lora_path", folder)
    assert "no such file" in refused(case, "--lora_path", case["zeros"], "--val_data", tmp_path / "no.jsonl")
    assert "no such gates file" in refused(case, "--lora_path", case["zeros"], "--gates", tmp_path / "no.toml")
    assert "--max_tokens many" in refused(case, "--lora_path", case["zeros"], "--max_tokens", "many")


def test_damaged_rows_and_photographs_are_named_by_line(case, tmp_path):
    rows = read_jsonl(case["data"][1])[:4]
    path = tmp_path / "val.jsonl"
    write_jsonl(path, rows)
    with open(path, "a") as file:
        file.write('{"image_path": \n')
    assert f"{path}:5: not valid JSON" in refused(case, "--lora_path", case["zeros"], "--val_data", path)
    page = tmp_path / "page.jpg"
    page.write_text("<html>not found</html>")
    write_jsonl(path, [rows[0], rows[1] | {"image_path": str(page)}])
    error = refused(case, "--lora_path", case["zeros"], "--val_data", path)
    assert f"{path}:2: {page}: not a readable photograph" in error


def test_adapter_without_training_args_is_warned_of(case, tmp_path):
    folder = tmp_path / "foreign"
    shutil.copytree(case["zeros"], folder)
    (folder / "training_args.json").unlink()
    arguments = ("--base_model", case["base"], "--val_data", case["data"][1], "--max_examples", 1)
    _, report = report_of(case, "foreign", "--lora_path", folder, *arguments)
    assert "neither its base nor its training data could be checked" in report["warnings"][0]


def test_record_of_nothing_in_use_is_no_third_arm(case, tmp_path):
    folder = case["folder"] / "models" / "ansel"
    folder.mkdir()
    write_json(folder / "deployed.json", {"schema_version": 1, "advisor": "ansel", "version": None, "adapter": None})
    _, report = report_of(case, "none", "--lora_path", case["zeros"], "--max_examples", 1)
    shutil.rmtree(folder)
    assert list(report["arms"]) == ["base", "candidate"]


def test_references_that_are_no_analysis_count_for_the_loss_alone(case, tmp_path):
    rows = read_jsonl(case["data"][1])[:2]
    write_jsonl(tmp_path / "val.jsonl", [rows[0] | {"response": "<div>8.1/10</div>"}, rows[1]])
    _, report = report_of(case, "html", "--lora_path", case["zeros"], "--val_data", tmp_path / "val.jsonl")
    assert "1 of 2 references are no analysis: they count for the loss alone." in report["warnings"]
    assert report["summary"]["arms"]["base"]["loss.nats"]["n"] == 2
    assert report["examples"][0]["reference"] is None


def test_item_key_names_content():
    from common.dataset import Example

    def key(prompt="p", response="r", sha="a"):
        return Item(0, Example(prompt, response, (), (), "job", "f:1"), [sha], PromptSpecification()).key

    assert key() == key()
    assert len({key(), key("q"), key(response="s"), key(sha="b")}) == 4


def test_a_prompt_that_does_not_tell_its_dimensions_is_named_in_a_warning(case, tmp_path):
    rows = read_jsonl(case["data"][1])
    rows[0]["prompt"] = "Say something about this photograph."
    path = tmp_path / "val.jsonl"
    write_jsonl(path, rows)
    damaged = {"specification": {"dimensions": 5}}  # a damaged record is none: the prompt itself is read
    evaluation = SimpleNamespace(
        val_data=path, training=damaged, adapters={}, warnings=[], options=SimpleNamespace(max_examples=None)
    )
    items = setup.load_items(evaluation)
    assert len(items) == len(rows) and len(items[1].specification.dimensions) == 7
    (warning,) = evaluation.warnings
    assert f"{path}: the prompt of 1 of {len(rows)} examples does not tell which dimensions it wants" in warning
