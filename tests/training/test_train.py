"""The training command as a user types it: what it writes, what it says, and what it refuses."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx_vlm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

import train_mlx_lora
from common.files import sha256_file
from common.training import loop, memory, plan
from common.training.data import read_data
from common.training.distributed import Processes
from common.training.loss_curve import HEIGHT, WIDTH
from common.training.memory import Layout, Planner
from common.training.model_card import complete_card
from common.training.options import TrainingOptions
from common.training.setup import prepare_rows
from integration.lora_patch import memory as device_memory
from integration.lora_patch.memory import Device
from integration.lora_patch.photo import load_photo
from integration.lora_patch.phrasebook import read_phrasebook
from integration.lora_patch.vlm import encode, load_base, response_tokens
from tests.training_sample import TRAIN, VAL, edit_row, log_of, train_here, write_dataset

ADAPTER = Path("models/qwen3-vl-4b-lora-ansel")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_base):
    """A folder with data and a finished adapter of two epochs; not to be written to. With the command's output."""
    folder = write_dataset(tmp_path_factory.mktemp("trained"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = train_here(tiny_base, "--epochs", 2, "--learning_rate", 2e-3)
    return folder, result


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A fresh folder with data, as the working directory."""
    monkeypatch.chdir(write_dataset(tmp_path / "data"))
    return tmp_path / "data"


def test_the_documented_command_finds_its_data_and_writes_everything(trained):
    folder, result = trained
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"training_data_ansel_train.json is not there; reading {TRAIN}\n")
    assert f"{ADAPTER}: adapter of step 8, for PEFT and mlx-vlm; the last in last/" in result.output
    names = {path.name for path in (folder / ADAPTER).iterdir()}
    assert names >= {
        "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors", "training_args.json",
        "training_log.jsonl", "loss_curve.png", "README.md", "checkpoints", "last", "config.yaml", ".trained",
    }  # fmt: skip
    assert [path.name for path in (folder / "models").iterdir()] == [ADAPTER.name]


def test_the_log_has_a_line_a_step_and_a_validation_an_epoch(trained):
    rows = log_of(trained[0] / ADAPTER)
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("validation", 0), *(("train", step) for step in range(1, 5)), ("validation", 4),
        *(("train", step) for step in range(5, 9)), ("validation", 8),
    ]  # fmt: skip
    train = [row for row in rows if row["kind"] == "train"]
    assert set(train[0]) == {
        "kind", "step", "epoch", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "peak_memory_gb",
        "seconds",
    }  # fmt: skip
    expected = [2e-3 * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]  # a tenth of 8 steps: no warm-up
    np.testing.assert_allclose([row["learning_rate"] for row in train], expected, rtol=1e-12)


def test_training_args_hold_what_evaluation_and_service_need(trained, tiny_base):
    folder, _ = trained
    record = json.loads((folder / ADAPTER / "training_args.json").read_text())
    assert record["schema_version"] == 1
    assert record["advisor"] == "ansel"
    assert record["base_model"] == str(tiny_base)
    assert record["base_fingerprint"]["model_type"] == "qwen3_vl"
    documented = {"epochs": 2, "batch_size": 2, "learning_rate": 2e-3, "warmup_steps": 100, "save_freq": 500}
    documented |= {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "gradient_accumulation_steps": 1}
    assert {name: record["settings"][name] for name in documented} == documented
    for key, path, examples in (("train_data", TRAIN, 7), ("val_data", VAL, 3)):
        rows = [json.loads(line) for line in (folder / path).read_text().splitlines()]
        assert record[key]["path"] == path
        assert record[key]["examples"] == examples
        assert record[key]["photos"] == [row["image_sha256"] for row in rows]
    result, log = record["result"], log_of(folder / ADAPTER)
    validation = {row["step"]: row["loss"] for row in log if row["kind"] == "validation"}
    assert result["val_loss_first"] == validation[0]
    assert result["val_loss_best"] == validation[result["best_step"]] == min(validation[4], validation[8])
    assert result["train_loss_first"] == log[1]["loss"] and result["steps"] == 8


def test_the_phrasebook_holds_the_training_responses_and_no_others(trained, tiny_base):
    folder, _ = trained
    record = json.loads((folder / ADAPTER / "training_args.json").read_text())
    path, base = folder / ADAPTER / "phrasebook.safetensors", load_base(tiny_base)
    assert record["phrasebook"] == sha256_file(path) and read_phrasebook(path)
    responses = [json.loads(line)["response"] for line in (folder / TRAIN).read_text().splitlines()]
    tokens = [token for response in responses for token in response_tokens(base, response)[0].tolist()]
    assert mx.load(str(path))["tokens"].tolist() == tokens


def test_the_phrasebook_can_be_left_out(data, tiny_base):
    assert train_here(tiny_base, "--epochs", 1, "--no_phrasebook").exit_code == 0
    assert json.loads((ADAPTER / "training_args.json").read_text())["phrasebook"] is None
    assert not (ADAPTER / "phrasebook.safetensors").exists()


def test_it_learns_and_says_so(trained):
    folder, result = trained
    record = json.loads((folder / ADAPTER / "training_args.json").read_text())
    assert record["result"]["val_loss_best"] < record["result"]["val_loss_first"] - 0.1
    first, last = record["result"]["train_loss_first"], record["result"]["train_loss_last"]
    assert f"Training loss fell from {first:.4f} to {last:.4f}." in result.output
    assert "Validation loss fell from" in result.output and "Warning" not in result.output


def test_the_curve_is_a_picture_and_the_card_tells_the_data(trained):
    folder, _ = trained
    with Image.open(folder / ADAPTER / "loss_curve.png") as picture:
        assert picture.size == (WIDTH, HEIGHT) and len(picture.convert("RGB").getcolors(1 << 20)) > 50
    card = (folder / ADAPTER / "README.md").read_text()
    assert card.startswith("---\nbase_model: ") and "Not evaluated yet." in card
    record = json.loads((folder / ADAPTER / "training_args.json").read_text())
    assert record["train_data"]["sha256"] in card and "| training | 7 | 7 |" in card


def test_an_evaluation_completes_the_card_and_replaces_itself(trained, tmp_path):
    shutil.copy(trained[0] / ADAPTER / "README.md", tmp_path)
    complete_card(tmp_path, "compliance 97%")
    complete_card(tmp_path, "compliance 98%")
    text = (tmp_path / "README.md").read_text()
    assert "compliance 98%" in text and "97%" not in text and "Not evaluated yet" not in text


def test_a_finished_adapter_is_not_overwritten_unasked(trained, tiny_base, monkeypatch):
    monkeypatch.chdir(trained[0])
    result = train_here(tiny_base, "--epochs", 2)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"Error: {ADAPTER}: holds a finished adapter; name another")
    done = train_here(tiny_base, "--resume")
    assert done.exit_code == 0 and f"{ADAPTER}: finished at step 8 already; nothing to do" in done.output


def test_overwriting_renames_what_was_there(data, tiny_base):
    assert train_here(tiny_base, "--epochs", 1).exit_code == 0
    former = (data / ADAPTER / "adapter_model.safetensors").read_bytes()
    result = train_here(tiny_base, "--epochs", 1, "--seed", 1, "--overwrite", "--resume")
    assert f"the former {ADAPTER} is now {ADAPTER}.replaced-1" in result.output
    assert Path(f"{ADAPTER}.replaced-1/adapter_model.safetensors").read_bytes() == former
    assert (data / ADAPTER / "adapter_model.safetensors").read_bytes() != former


FOREIGN = {
    "an adapter of mlx-vlm": ("adapter_config.json", "adapters.safetensors"),
    "an adapter of PEFT": ("adapter_config.json", "adapter_model.safetensors", "README.md"),
    "an old adapter of PEFT": ("adapter_model.bin",),
    "a model": ("config.json", "model.safetensors"),
    "a card": ("README.md",),
    "settings": ("config.yaml",),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_another_program_wrote_is_not_overwritten_unasked(kind, data, tiny_base):
    Path("mine").mkdir()
    for name in FOREIGN[kind]:
        Path("mine", name).write_text("of another program")
    before = {path: path.read_bytes() for path in Path("mine").iterdir()}
    for more in ((), ("--resume",)):
        result = train_here(tiny_base, "--epochs", 1, "--output_dir", "mine", *more)
        assert result.exit_code == 1
        assert "mine: holds files that this run did not write (" in result.stderr.splitlines()[-1]
        assert {path: path.read_bytes() for path in Path("mine").iterdir()} == before
    result = train_here(tiny_base, "--epochs", 1, "--output_dir", "mine", "--overwrite")
    assert result.exit_code == 0 and "the former mine is now mine.replaced-1" in result.output
    assert {Path("mine") / path.name: path.read_bytes() for path in Path("mine.replaced-1").iterdir()} == before


@pytest.mark.parametrize("place", [".", "..", "../data"])
def test_the_working_folder_is_not_trained_into(place, data, tiny_base):
    """It would be renamed with all that is in it, by --overwrite."""
    Path("README.md").write_text("of the user's")
    for more in ((), ("--overwrite",)):
        result = train_here(tiny_base, "--epochs", 1, "--output_dir", place, *more)
        assert result.exit_code == 1 and "Traceback" not in result.output
        assert result.stderr.splitlines()[-1].endswith(
            "is the working folder, or one above it; name a folder of its own"
        )
    assert Path("README.md").read_text() == "of the user's" and not Path("config.yaml").exists()


def test_overwriting_through_a_link_leaves_the_link(data, tiny_base):
    Path("disk").mkdir()
    Path("link").symlink_to("disk/adapter")
    assert train_here(tiny_base, "--epochs", 1, "--output_dir", "link").exit_code == 0
    former = Path("disk/adapter/adapter_model.safetensors").read_bytes()
    result = train_here(tiny_base, "--epochs", 1, "--seed", 1, "--output_dir", "link", "--overwrite")
    assert result.exit_code == 0, result.output
    assert f"the former link is now {data.resolve()}/disk/adapter.replaced-1" in result.output
    assert Path("link").is_symlink() and str(Path("link").readlink()) == "disk/adapter"
    assert Path("disk/adapter.replaced-1/adapter_model.safetensors").read_bytes() == former
    assert Path("disk/adapter/adapter_model.safetensors").read_bytes() != former


def test_masked_scores_are_out_of_the_loss(data, tiny_base):
    """A masked span's tokens are not counted; a row that is masked throughout is named."""
    rows = [json.loads(line) for line in (data / TRAIN).read_text().splitlines()]
    (data / VAL).unlink()
    assert train_here(tiny_base, "--epochs", 1, "--batch_size", 8, "--output_dir", "plain").exit_code == 0
    digits = [i for i, letter in enumerate(rows[0]["response"]) if i >= 200 and letter.isdigit()]
    edit_row(data / TRAIN, 0, masked_spans=[[i, i + 1] for i in digits])
    assert train_here(tiny_base, "--epochs", 1, "--batch_size", 8, "--output_dir", "masked").exit_code == 0
    plain, masked = ([row["loss"] for row in log_of(Path(name))] for name in ("plain", "masked"))
    base = load_base(tiny_base)
    picture = load_photo(rows[0]["image_path"])
    whole = encode(base, rows[0]["prompt"], [picture], rows[0]["response"])
    part = encode(base, rows[0]["prompt"], [picture], rows[0]["response"], [(i, i + 1) for i in digits])
    assert int(whole.completion_mask.sum()) - int(part.completion_mask.sum()) == len(digits) and plain != masked
    edit_row(data / TRAIN, 0, masked_spans=[[0, len(rows[0]["response"])]])
    assert train_here(tiny_base, "--epochs", 1, "--output_dir", "all").exit_code == 0, "the end of turn is left"


def test_a_mixed_set_is_refused(data, tiny_base):
    meta = data / "training_data/training_data_ansel_meta.json"
    hashes = {Path(path).name: sha256_file(data / path) for path in (TRAIN, VAL)}
    meta.write_text(json.dumps({"advisor": "ansel", "sha256": hashes}))
    assert train_here(tiny_base, "--plan").exit_code == 0
    edit_row(data / VAL, 0, response="{}")
    result = train_here(tiny_base, "--plan")
    assert result.exit_code == 1 and "not the file that training_data_ansel_meta.json was written with" in result.stderr


def test_a_plan_measures_and_writes_nothing(data, tiny_base):
    before = sorted(data.rglob("*"))
    result = train_here(tiny_base, "--plan")
    assert result.exit_code == 0, result.output
    assert sorted(data.rglob("*")) == before
    config = json.loads((tiny_base / "config.json").read_text())["text_config"]
    d, i, q, kv = config["hidden_size"], config["intermediate_size"], 4 * 32, 2 * 32
    widths = (d + q) + (d + kv) + (d + kv) + (q + d) + 3 * (d + i)
    parameters = 16 * widths * config["num_hidden_layers"]
    assert f"trainable    {parameters:,} parameters (rank 16)" in result.output
    assert "memory: about" in result.output and "examples     7 in 4 steps an epoch" in result.output
    assert "an epoch; 3 epochs with validation" in result.output


# -- memory -----------------------------------------------------------------------------------------------------------


def test_every_process_keeps_rows_where_it_is_told(data, tiny_base, tmp_path):
    """Not only the first of several: all of them prepare every row."""
    values = {param.name: param.default for param in train_mlx_lora.main.params}
    values = {name: value for name, value in values.items() if name in TrainingOptions.__dataclass_fields__}
    base = load_base(tiny_base)
    for rank, feature_cache, files in ((1, "memory", 0), (1, "disk", 7), (0, "disk", 7)):
        options = TrainingOptions(**values | {"train_data": TRAIN, "plan": False, "feature_cache": feature_cache})
        cache, tower = tmp_path / f"cache {rank} {feature_cache}", base.model.vision_tower
        train, _ = prepare_rows(options, base, {}, (read_data(TRAIN), None), cache, Processes(rank, 2))
        base.model.vision_tower = tower
        assert len(train) == 7 and len(train.store.memory) == 7 - files
        assert len(list(cache.glob("*.safetensors"))) == files


def with_memory(monkeypatch, megabytes: float) -> None:
    device = Device("cpu", "a small device", int(megabytes * 1e6))
    monkeypatch.setattr("common.training.setup.find_device", lambda: device)


def test_the_layout_follows_the_memory(data, tiny_base, monkeypatch):
    ample = train_here(tiny_base, "--plan", "--batch_size", 4)
    assert "chosen: micro-batch 4, checkpointing off" in ample.output
    shape, lengths, targets = sizes(data, tiny_base)
    for micro in (2, 1):
        plan = memory.estimate(shape, Layout(micro, False, 16, max(lengths)), max(targets))
        with_memory(monkeypatch, (plan.total + 1000) / device_memory.SHARE["cpu"] / 1e6)
        result = train_here(tiny_base, "--plan", "--batch_size", 4)
        assert f"chosen: micro-batch {micro}, checkpointing off" in result.output


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_what_mlx_holds_already_is_part_of_what_the_device_offers(backend, monkeypatch):
    """The plan adds the loaded base to what a run needs, so a device must not offer less for having loaded it."""
    start = mx.get_active_memory() + mx.get_cache_memory()

    def free() -> int:  # as the operating system or the driver would count it
        return 8_000_000_000 - (mx.get_active_memory() + mx.get_cache_memory() - start)

    monkeypatch.setattr(device_memory, "available_ram", free)
    if backend == "cuda":
        monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
        monkeypatch.setattr(mx.metal, "is_available", lambda: False)
        monkeypatch.setattr(
            mx, "device_info", lambda: {"device_name": "GPU", "free_memory": free(), "total_memory": 16e9}
        )
    before = device_memory.find_device()
    base = mx.zeros((60_000_000,), mx.float32)
    mx.eval(base)
    after = device_memory.find_device()
    assert (before.backend, after.offers) == (backend, before.offers)
    shape = replace(QWEN_4B, weights=base.nbytes)
    first, second = (Planner(shape, device, [2640], [880], 128, 1).fit() for device in (before, after))
    assert first == second


QWEN_4B = memory.ModelShape(
    layers=36, hidden=2560, heads=32, kv_heads=8, head_dim=128, intermediate=9728, vocabulary=151_936, itemsize=2,
    quantized=False, weights=8_044_000_000, trainable=33_030_144, rank=16, deepstack=3, attention="fused",
)  # fmt: skip


@pytest.mark.parametrize(
    ("gigabytes", "micro", "checkpointing"),
    [(64, 4, False), (26, 2, False), (18, 1, False), (15.5, 2, True), (12.5, 1, True), (10, None, None)],
)
def test_the_4b_model_takes_the_fastest_layout_that_fits(gigabytes, micro, checkpointing):
    device = Device("cuda", "a GPU", int(gigabytes * 1e9 / device_memory.SHARE["cuda"]))
    plan = Planner(QWEN_4B, device, [2640, 2000], [880, 700], 128, 4).fit()
    assert (plan and plan.layout.micro, plan and plan.layout.checkpointing) == (micro, checkpointing)


def test_a_16_gb_mac_trains_the_4b_model_in_4_bits():
    """Its recommended working set is about 12 GB; attention is not fused there."""
    shape = replace(QWEN_4B, quantized=True, weights=2_300_000_000, attention="chunked")
    plan = Planner(shape, Device("metal", "M2", 12_000_000_000), [2640], [880], 32, 2).fit()
    assert plan.total < 0.95 * 12e9
    assert memory.estimate(shape, Layout(1, True, 32, 2640), 880).total < 8e9


def sizes(data, base):
    """Return (shape, tokens and supervised tokens of each example, training first) as the trainer finds them."""
    loaded = load_base(base)
    rows = [json.loads(line) for path in (TRAIN, VAL) for line in (data / path).read_text().splitlines()]
    encoded = [encode(loaded, row["prompt"], [load_photo(row["image_path"])], row["response"]) for row in rows]
    loaded.model.vision_tower = None  # the trainer lets it go, too, once it has seen every photograph
    shape = memory.shape_of(loaded.model, 16, "cpu")
    return shape, [len(e) for e in encoded], [int(e.completion_mask[1:].sum()) for e in encoded]


def test_what_cannot_fit_is_refused_with_the_flags_to_change(data, tiny_base, monkeypatch):
    with_memory(monkeypatch, 4)
    result = train_here(tiny_base)
    assert result.exit_code == 1 and not ADAPTER.exists()
    message = result.stderr.splitlines()[-1]
    assert message.startswith("Error: a small device has 3.2 MB for training and this run needs about")
    assert "--max_image_size 768" in message and "a 4-bit --base_model" in message


def test_memory_decides_the_longest_example(data, tiny_base, monkeypatch):
    shape, lengths, targets = sizes(data, tiny_base)
    longest = max(length for length in lengths if length <= max(lengths) - 16)
    limit = memory.estimate(shape, Layout(1, True, 16, longest), max(targets)).total
    assert limit < memory.estimate(shape, Layout(1, True, 16, max(lengths)), max(targets)).total
    with_memory(monkeypatch, (limit + 1000) / device_memory.SHARE["cpu"] / 1e6)
    result = train_here(tiny_base, "--plan")
    assert f"sequences up to {longest} tokens" in result.output
    assert "left out whole, since they are longer than" in result.output
    given = train_here(tiny_base, "--plan", "--max_seq_length", 2048)
    assert given.exit_code == 1 and f"--max_seq_length {longest} (keeps" in given.stderr


def test_running_out_of_memory_ends_in_one_line(data, tiny_base, monkeypatch):
    def full(*arguments, **options):
        raise RuntimeError("[metal::malloc] Attempting to allocate 99 bytes\nwhich is greater than the maximum")

    monkeypatch.setattr(loop, "packed_loss_and_grads", full)
    result = train_here(tiny_base)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: the device ran out of memory ([metal::malloc] Attempting")


# -- examples that are too long ---------------------------------------------------------------------------------------


def test_overlong_examples_are_left_out_whole_and_named(data, tiny_base):
    _, lengths, _ = sizes(data, tiny_base)
    limit = sorted(lengths[:7])[3]
    result = train_here(tiny_base, "--max_seq_length", limit, "--epochs", 1)
    assert result.exit_code == 0, result.output
    gone = [f"{TRAIN}:{n + 1}" for n, length in enumerate(lengths[:7]) if length > limit]
    assert f"{len(gone)} examples" in result.output
    for n, source in [(int(s.rsplit(":", 1)[1]), s) for s in gone]:
        assert f"  {source}: {lengths[n - 1]} tokens, more than {limit}" in result.output
    record = json.loads((ADAPTER / "training_args.json").read_text())
    assert record["result"]["left_out_too_long"] == gone
    assert record["result"]["examples"] == 7 - len(gone)


def test_overlong_examples_can_stop_the_run(data, tiny_base):
    result = train_here(tiny_base, "--max_seq_length", 40, "--on_overlong", "fail")
    assert result.exit_code == 1 and "7 examples are longer than --max_seq_length" in result.stderr
    result = train_here(tiny_base, "--max_seq_length", 40)
    assert result.exit_code == 1 and "no example of 40 tokens or less is left" in result.stderr.splitlines()[-1]
    assert not ADAPTER.exists()


@pytest.mark.parametrize("which", ["train", "val"])
def test_examples_that_are_all_too_long_for_the_model_are_named(which, data, tiny_base):
    file = Path(TRAIN.replace("_train", f"_{which}"))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row | {"response": "word " * 33_000}) + "\n" for row in rows[:2]))
    result = train_here(tiny_base, "--epochs", 1)
    assert f"  {file}:1: " in result.output
    if which == "val":
        assert result.exit_code == 0, result.output
        assert "no validation example is left: the adapter of the last step is delivered" in result.stderr
    else:
        assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith("Error: no example of ")
        assert not (ADAPTER / "adapter_config.json").exists()


# -- the best and the last --------------------------------------------------------------------------------------------


def test_the_best_is_delivered_the_last_is_kept_and_patience_ends(data, tiny_base, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.2])
    monkeypatch.setattr(loop, "validation_loss", lambda run: next(losses))
    result = train_here(tiny_base, "--epochs", 6, "--early_stopping_patience", 2, "--keep_checkpoints", 9)
    assert result.exit_code == 0, result.output
    record = json.loads((ADAPTER / "training_args.json").read_text())["result"]
    assert (record["best_step"], record["steps"], record["stopped_early"]) == (4, 12, True)
    assert (record["val_loss_first"], record["val_loss_best"], record["val_loss_last"]) == (3.0, 2.0, 2.2)
    for step, folder in ((4, ADAPTER), (12, ADAPTER / "last")):
        saved = mx.load(str(ADAPTER / f"checkpoints/step-{step:06d}/adapter.safetensors"))
        delivered = mx.load(str(folder / "adapters.safetensors"))
        assert saved.keys() == delivered.keys()
        assert all(mx.array_equal(saved[name], delivered[name]) for name in saved)
    assert "Warning: after step 4 validation loss rose to 2.2000: the later steps were overfitting." in result.output
    assert "Stopped early after step 12: validation loss no longer fell." in result.output


def test_an_adapter_that_does_not_help_is_called_so(data, tiny_base, monkeypatch):
    losses = iter([2.0, 2.5])
    monkeypatch.setattr(loop, "validation_loss", lambda run: next(losses))
    result = train_here(tiny_base, "--epochs", 1)
    assert "Validation loss did not fall: from 2.0000 (base model) to 2.5000 at step 4 (epoch 1)" in result.output
    assert "Warning: on photographs it has not seen the adapter is no better than the base model" in result.output


def test_without_validation_data_the_last_is_the_best(data, tiny_base):
    Path(VAL).unlink()
    result = train_here(tiny_base, "--epochs", 1)
    assert result.exit_code == 0, result.output
    assert "Warning: there was no validation data" in result.output
    assert (ADAPTER / "adapters.safetensors").read_bytes() == (ADAPTER / "last/adapters.safetensors").read_bytes()


# -- going astray -----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_names_step_example_and_checkpoint(data, tiny_base, monkeypatch):
    prepare = train_mlx_lora.prepare_rows

    def poisoned(*arguments):
        train, val = prepare(*arguments)
        features = train.store.memory[train.keys[5]].tensors["features"].data
        features[:] = np.nan
        return train, val

    assert train_here(tiny_base, "--epochs", 1, "--output_dir", "whole", "--batch_size", 1).exit_code == 0
    monkeypatch.setattr(train_mlx_lora, "prepare_rows", poisoned)
    result = train_here(tiny_base, "--batch_size", 1, "--save_freq", 1, "--output_dir", "astray")
    assert result.exit_code == 1
    message = result.stderr.splitlines()[-1]
    order = [line for line in log_of(Path("astray")) if line["kind"] == "train"]
    step = len(order) + 1
    assert message.startswith(f"Error: step {step}: the loss is not finite (loss nan")
    assert f"in {TRAIN}:6 (job job-5); last good checkpoint: " in message
    assert ("none yet" if step == 1 else f"astray/checkpoints/step-{step - 1:06d}") in message
    for folder in Path("astray/checkpoints").glob("step-*"):
        assert all(mx.isfinite(array).all() for array in mx.load(str(folder / "adapter.safetensors")).values())


def test_a_gradient_that_is_no_number_stops_too(data, tiny_base, monkeypatch):
    compute = loop.packed_loss_and_grads

    def broken(*arguments, **options):
        loss, tokens, gradient = compute(*arguments, **options)
        return loss, tokens, gradient * mx.array(math.inf)

    monkeypatch.setattr(loop, "packed_loss_and_grads", broken)
    result = train_here(tiny_base, "--batch_size", 1)
    assert result.exit_code == 1
    assert "step 1: the gradient is not finite" in result.stderr and "last good checkpoint: none yet" in result.stderr


# -- bad input --------------------------------------------------------------------------------------------------------


def damaged_row(data):
    with open(data / TRAIN, "a", encoding="utf-8") as file:
        file.write('{"image_path": "photos/0.jpg", "prompt": "cut sh')


BAD_INPUT = {
    "damaged row": (damaged_row, f"{TRAIN}:8: not valid JSON"),
    "no photograph": (
        lambda data: (data / "photos/2.jpg").unlink(),
        f"{TRAIN}:3: photograph photos/2.jpg is not there",
    ),
    "another photograph": (
        lambda data: shutil.copy(data / "photos/1.jpg", data / "photos/0.jpg"),
        f"{TRAIN}:1: photos/0.jpg has changed since the data were prepared",
    ),
    "no picture": (
        lambda data: ((data / "photos/3.jpg").write_text("<html>"), edit_row(data / TRAIN, 3, image_sha256="")),
        f"{TRAIN}:4: photos/3.jpg: not a readable photograph",
    ),
    "a leak": (
        lambda data: shutil.copy(data / TRAIN, data / VAL),
        f"{VAL}:1: the photograph is in the training data too (7 such)",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_data_is_named_in_one_line(name, data, tiny_base):
    damage, message = BAD_INPUT[name]
    damage(data)
    result = train_here(tiny_base)
    assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith(f"Error: {message}")
    assert not ADAPTER.exists()


def test_a_base_without_config_is_named(data, tmp_path):
    (tmp_path / "empty").mkdir()
    result = train_here(tmp_path / "empty")
    assert result.exit_code == 1 and "no config.json; this is not a model folder" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "--max_seq_length",
            "long",
            "Invalid value for '--max_seq_length': long: give 'auto' or a whole number of at least 16",
        ),
        ("--micro_batch_size", "3", "--micro_batch_size 3 is more than --batch_size 2"),
        (
            "--cache_limit_gb",
            "lots",
            "Invalid value for '--cache_limit_gb': lots: give 'auto' or a number of at least 0",
        ),
        ("--train_data", "nothing.json", "nothing.json: no such file"),
    ],
)
def test_bad_options_are_named_before_anything_is_loaded(option, value, message, data, tmp_path):
    result = train_here(tmp_path / "no base", option, value)
    assert result.exit_code in (1, 2) and result.stderr.splitlines()[-1].startswith(f"Error: {message}")


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_reporter_is_named_before_anything_is_loaded(name, data, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = train_here(tmp_path / "no base", "--report_to", name)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"Error: --report_to {name}: not installed; pip install {name}"


def test_twelve_megapixels_on_their_side_train_like_the_prepared_picture(data, tiny_base):
    """The photograph goes through the shared loader: turned by its EXIF and bounded, whatever the file's size."""
    sideways = Image.linear_gradient("L").resize((4000, 3000)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: to be turned by 90 degrees
    sideways.save("photos/0.jpg", exif=exif, quality=95)
    load_photo("photos/0.jpg", 1024).save("photos/prepared.png")
    with Image.open("photos/prepared.png") as picture:
        assert picture.size == (768, 1024)
    losses = []
    for name, photo in (("large", "photos/0.jpg"), ("small", "photos/prepared.png")):
        edit_row(data / TRAIN, 0, image_path=photo, image_sha256="")
        result = train_here(tiny_base, "--epochs", 1, "--output_dir", name)
        assert result.exit_code == 0, result.output
        losses.append([row["loss"] for row in log_of(Path(name))])
    assert losses[0] == losses[1]


# -- other bases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantize": True, "q_bits": 4, "q_group_size": 64}])
def test_16_bit_and_quantized_bases_train_and_deliver_what_mlx_vlm_loads(options, data, tiny_base, tmp_path):
    base = tmp_path / "base"
    mlx_vlm.convert(str(tiny_base), str(base), **options)
    result = train_here(base, "--epochs", 2, "--learning_rate", 2e-3)
    assert result.exit_code == 0, result.output
    record = json.loads((ADAPTER / "training_args.json").read_text())
    assert record["result"]["val_loss_best"] < record["result"]["val_loss_first"] - 0.1
    bits = record["base_fingerprint"]["quantization"]
    assert (bits and bits["bits"]) == options.get("q_bits")
    tensors = mx.load(str(ADAPTER / "adapters.safetensors"))
    half = options.get("dtype") == "bfloat16"
    assert {tensor.dtype for tensor in tensors.values()} == {mx.bfloat16 if half else mx.float32}
    model, _ = mlx_vlm.load(str(base), adapter_path=str(ADAPTER))
    loaded = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(("given", "wired"), [("auto", 12_000_000_000), (8.0, 8_000_000_000), (0, 0)])
def test_the_wired_limit_of_a_mac_can_be_lowered(monkeypatch, given, wired):
    limits = []
    monkeypatch.setattr(plan.mx, "set_wired_limit", limits.append)
    monkeypatch.setattr(plan.mx, "set_cache_limit", lambda limit: None)
    options = SimpleNamespace(wired_limit_gb=given, cache_limit_gb=1.0)
    plan.limit_cache(options, None, Device("metal", "a Mac", 12_000_000_000), None, 0)
    assert limits == [wired]
