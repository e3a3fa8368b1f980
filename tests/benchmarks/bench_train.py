"""Measure a training step of ours, mlx-vlm's, transformers + PEFT's and Unsloth's on the same rows of the same base.

    python tests/benchmarks/bench_train.py --shape tiny
    python tests/benchmarks/bench_train.py --shape 4b --output table.md
    python tests/benchmarks/bench_train.py --shape 4b --only "ours, mlx-vlm" --photo 1024x1024 --response 400

Makes a base of that shape with random weights and rows with one photograph each, then trains with every trainer in a
process of its own: rank 16 on all seven projections, no dropout unless the line says so, AdamW at 2e-4, the same
initial adapter. Prints tokens a second, the median step, the time to the first step, the peak memory and the loss of
each step, as a Markdown table. The base and the rows are in a temporary folder; --output writes the table.

What a peer's line includes is what its user gets: mlx-vlm, PEFT and Unsloth run the vision tower every step and form
the logits of every token. A trainer that cannot be imported, or takes longer than --time_limit, says so in its line.
PEFT runs where torch is: in this Python, or the one that --torch_python names.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

RANK, ALPHA, RATE = 16, 32, 2e-4
TEXT = {
    "tiny": dict(
        vocab_size=1536, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32,
    ),
    "4b": dict(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
    ),
}  # fmt: skip
VISION = {
    "tiny": dict(depth=6, hidden_size=128, intermediate_size=512, num_heads=4, deepstack_visual_indexes=[1, 3, 5]),
    "4b": dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, deepstack_visual_indexes=[5, 11, 17]),
}
SECTIONS = {32: [6, 5, 5], 128: [24, 20, 20]}
# photograph, prompt tokens and response tokens: 4b is 768 image tokens of 2,640; tiny is a photograph and little text
ROWS = {"tiny": ("768x576", 90, 87), "4b": ("1024x768", 983, 879)}
DTYPE = {"tiny": "float32", "4b": "bfloat16"}

# name: (function, options, whether it needs torch)
TRAINERS = {
    "ours": ("ours", {}, False),
    "ours, dropout 0.05": ("ours", {"dropout": 0.05}, False),
    "ours, checkpointing": ("ours", {"checkpointing": True}, False),
    "ours, 4-bit base": ("ours", {"bits": 4}, False),
    "ours, 4-bit base, checkpointing": ("ours", {"bits": 4, "checkpointing": True}, False),
    "mlx-vlm": ("mlx_vlm_trainer", {}, False),
    "mlx-vlm, checkpointing": ("mlx_vlm_trainer", {"checkpointing": True}, False),
    "transformers + PEFT": ("peft_trainer", {}, True),
    "transformers + PEFT, checkpointing": ("peft_trainer", {"checkpointing": True}, True),
    "Unsloth (MLX), not compiled": ("unsloth_trainer", {"compiled": False}, False),
    "Unsloth (MLX)": ("unsloth_trainer", {}, False),
}


@click.command()
@click.option("--shape", type=click.Choice(list(TEXT)), default="tiny", show_default=True, help="Size of the base.")
@click.option("--rows", default=2, show_default=True, help="Rows; the steps take them in turn.")
@click.option("--photo", help="Pixels of each photograph, WIDTHxHEIGHT.  [default: 1024x768, tiny 768x576]")
@click.option("--prompt", type=int, help="Tokens of each prompt.  [default: 983, tiny 90]")
@click.option("--response", type=int, help="Tokens of each response.  [default: 879, tiny 87]")
@click.option("--steps", default=8, show_default=True, help="Steps of each trainer.")
@click.option("--only", multiple=True, help="Run trainers whose name starts with this; may be given several times.")
@click.option("--time_limit", default=300.0, show_default=True, help="Seconds for each trainer, loading included.")
@click.option("--torch_python", default=sys.executable, help="Python that has torch, transformers and peft.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the table to this file too.")
@click.option("--worker", hidden=True, help="Internal: the trainer that this process is to run.")
@click.option("--folder", hidden=True, type=click.Path(path_type=Path))
def main(shape, rows, photo, prompt, response, steps, only, time_limit, torch_python, output, worker, folder) -> None:
    """Compare trainers on the same rows."""
    if worker:
        name, options, _ = TRAINERS[worker]
        return globals()[name](folder, steps, **options)
    names = [name for name in TRAINERS if not only or any(name.startswith(start) for start in only)]
    with tempfile.TemporaryDirectory(dir=memory_folder()) as made:
        folder = Path(made)
        size, asked, answered = ROWS[shape]
        size = tuple(int(side) for side in (photo or size).split("x"))
        call_python(sys.executable, "make", folder, shape, rows, *size, prompt or asked, response or answered)
        about = json.loads((folder / "about.json").read_text())
        heading = title(shape, about, steps)
        click.echo(heading)
        results = {}
        for name in names:
            python = torch_python if TRAINERS[name][2] else sys.executable
            results[name] = run_trainer(name, python, folder, steps, time_limit)
            click.echo(f"  {name}: {results[name].get('failed') or line_of(results[name], about)}", err=True)
            if output:
                output.write_text(f"{heading}\n\n{table_of(results, about)}", encoding="utf-8")
    click.echo(f"\n{table_of(results, about)}")


def memory_folder() -> str | None:
    """Where a base of 9 GB is written and read fastest."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > 40e9 else None


def call_python(python: str, *arguments: object) -> None:
    """Make the base and the rows in a process of its own, whose memory is gone before the trainers start."""
    kind, *rest = arguments
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    code += f"from tests.benchmarks import bench_train\nbench_train.{kind}(*eval(sys.argv[1]))"
    subprocess.run([python, "-c", code, repr(tuple(str(a) if isinstance(a, Path) else a for a in rest))], check=True)


def run_trainer(name: str, python: str, folder: Path, steps: int, time_limit: float) -> dict:
    """Run one trainer; return its result, or {"failed": why}."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    command = [python, str(Path(__file__).resolve()), "--worker", name, "--folder", str(folder), "--steps", str(steps)]
    log = folder / "log.txt"
    try:
        with log.open("w") as out:
            done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, timeout=time_limit, cwd=folder)
    except subprocess.TimeoutExpired:
        steps_done = len(json.loads(result.read_text())["seconds"]) if result.exists() else 0
        if steps_done < 3:
            return {"failed": f"{steps_done or 'no'} step done within {time_limit:g} s"}
        done = None
    if done is not None and done.returncode:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        return {"failed": (last or ["failed without a word"])[0][:160]}
    return json.loads(result.read_text())


# -- the table --------------------------------------------------------------------------------------------------------


def title(shape: str, about: dict, steps: int) -> str:
    """Return what was measured, where and with what."""
    packages = ("mlx", "mlx-cuda-13", "mlx-vlm", "torch", "transformers", "peft", "unsloth_zoo")
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return (
        f"{date.today()}, {about['device']}, Python {platform.python_version()}, {', '.join(found)}. Qwen3-VL {shape} "
        f"shape, random {DTYPE[shape]} weights, batch 1, rank {RANK} on all seven projections, rows of "
        f"{about['tokens']} tokens ({about['image_tokens']} of the photograph, {about['targets']} supervised), "
        f"{steps} steps."
    )


def line_of(result: dict, about: dict) -> str:
    step = median_step(result)
    return f"{about['tokens'] / step:,.0f} tokens/s, {step * 1e3:.1f} ms, peak {result['peak'] / 1e9:.2f} GB"


def median_step(result: dict) -> float:
    """The median of the steps after the first two: those compile, and fill the allocator's cache."""
    return float(np.median(result["seconds"][2:]))


def table_of(results: dict, about: dict) -> str:
    """Return the Markdown table."""
    lines = [
        "| trainer | tokens/s | step, ms | first step, s | peak GB | loss per step |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, result in results.items():
        if "failed" in result:
            lines.append(f"| {name} | - | - | - | - | {result['failed']} |")
            continue
        step, losses = median_step(result), " ".join(f"{loss:.4f}" for loss in result["losses"])
        speed, first = f"{about['tokens'] / step:,.0f}", f"{result['seconds'][0]:.1f}"
        lines.append(f"| {name} | {speed} | {step * 1e3:.1f} | {first} | {result['peak'] / 1e9:.2f} | {losses} |")
    return "\n".join(lines) + "\n"


class Report:
    """Writes result.json after every step, so that a trainer that is stopped still has one."""

    def __init__(self, folder: Path):
        self.path, self.seconds, self.losses = Path(folder) / "result.json", [], []

    def add(self, seconds: float, loss: float, peak: int) -> None:
        self.seconds.append(seconds)
        self.losses.append(float(loss))
        content = {"seconds": self.seconds, "losses": self.losses, "peak": int(peak)}
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(content))
        temporary.rename(self.path)


# -- the base and the rows --------------------------------------------------------------------------------------------


def make(folder: str, shape: str, rows: int, width: int, height: int, prompt: int, response: int) -> None:
    """Write base/, rows.json with photographs, and the initial adapter: what every trainer reads."""
    import mlx.core as mx

    from common.model.lora import attach_lora, lora_parameters
    from integration.lora_patch.vlm import encode, load_base, prepare_row
    from tests.sample import make_tiny_model as maker

    folder = Path(folder)
    (folder / "base").mkdir()
    tokenizer = maker.train_tokenizer(1536)
    maker.write_tokenizer(folder / "base", tokenizer)
    config = maker.write_configs(folder / "base", tokenizer)
    text, vision = config["text_config"] | TEXT[shape], config["vision_config"] | VISION[shape]
    text["rope_scaling"] = text["rope_scaling"] | {"mrope_section": SECTIONS[text["head_dim"]]}
    vision |= {"out_hidden_size": text["hidden_size"], "num_position_embeddings": 2304}
    config |= {"text_config": text, "vision_config": vision, "dtype": DTYPE[shape]}
    text["dtype"] = vision["dtype"] = DTYPE[shape]
    (folder / "base/config.json").write_text(json.dumps(config))
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        settings = json.loads((folder / "base" / name).read_text())
        settings["size"] = {"shortest_edge": 64 * 64, "longest_edge": 4096 * 4096}
        (folder / "base" / name).write_text(json.dumps(settings))
    save_random_weights(folder / "base", config, getattr(mx, DTYPE[shape]))
    write_rows(folder, rows, (width, height), prompt, response)

    base = load_base(folder / "base")
    encoded = [encode(base, *example) for example in read_rows(folder)]
    for number, e in enumerate(encoded):
        arrays = {key: getattr(e, key) for key in ("input_ids", "completion_mask", "pixel_values", "image_grid_thw")}
        np.savez(folder / f"{number}.npz", **arrays)
    row = prepare_row(base, encoded[0])
    attach_lora(base, RANK, ALPHA)
    mx.save_safetensors(str(folder / "lora.safetensors"), lora_parameters(base.model))
    info = mx.device_info()
    about = {
        "tokens": len(row),
        "image_tokens": len(row.visual),
        "targets": int(row.completion_mask[1:].sum()),
        "device": str(info.get("device_name") or info.get("architecture") or platform.machine()),
    }
    (folder / "about.json").write_text(json.dumps(about))


def save_random_weights(folder: Path, config: dict, dtype) -> None:
    """Draw the weights on the device, straight in the base's dtype, and write them in Hugging Face's names."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_vlm.models.qwen3_vl import Model, ModelConfig, TextConfig, VisionConfig

    parts = {
        "text_config": TextConfig.from_dict(json.loads(json.dumps(config["text_config"]))),
        "vision_config": VisionConfig.from_dict(config["vision_config"]),
    }
    model, weights = Model(ModelConfig.from_dict({**config, **parts})), {}
    mx.random.seed(0)
    for name, weight in tree_flatten(model.parameters()):
        if weight.ndim > 1:
            value = 0.02 * mx.random.normal(weight.shape, dtype=dtype)
        else:
            value = (1 if name.endswith("weight") else 0) + 0.05 * mx.random.normal(weight.shape, dtype=dtype)
        name = name.replace("language_model.model.", "model.language_model.").replace("vision_tower.", "model.visual.")
        if name == "model.visual.patch_embed.proj.weight":
            value = value.transpose(0, 4, 1, 2, 3)
        weights[name] = mx.contiguous(value.astype(dtype))
        mx.eval(weights[name])
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})


def write_rows(folder: Path, rows: int, size: tuple[int, int], prompt: int, response: int) -> None:
    """Write photographs of noise, and digits for text: the tokenizer gives every digit a token of its own."""
    from PIL import Image

    rng, written = np.random.default_rng(0), []
    for number in range(rows):
        small = rng.integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize(size).save(folder / f"{number}.png")
        texts = ("".join(map(str, rng.integers(0, 10, length))) for length in (prompt, response))
        written.append([*texts, str(folder / f"{number}.png")])
    (folder / "rows.json").write_text(json.dumps(written))


def read_rows(folder: Path) -> list[tuple]:
    """Return (prompt, [photograph], response) of each row."""
    from PIL import Image

    return [(p, [Image.open(path).convert("RGB")], r) for p, r, path in json.loads((folder / "rows.json").read_text())]


# -- the trainers, each in its own process ----------------------------------------------------------------------------


def load_mlx(folder: Path, dropout: float = 0.0, bits: int | None = None):
    """Return the base with the initial adapter."""
    import mlx.core as mx
    import mlx.nn as nn

    from common.model.lora import attach_lora
    from integration.lora_patch.vlm import group_weights, load_base
    from tests.lora import update_lora

    base = load_base(folder / "base")
    if bits:
        nn.quantize(base.model.language_model, 64, bits)
        mx.eval(base.model.parameters())
        group_weights(base.model)
    attach_lora(base, RANK, ALPHA, dropout)
    update_lora(base.model, dict(mx.load(str(folder / "lora.safetensors"))))
    mx.clear_cache()
    mx.reset_peak_memory()
    return base


def ours(folder: Path, steps: int, checkpointing=False, dropout=0.0, bits=None) -> None:
    """This project's step: what `train_mlx_lora.py` runs."""
    import mlx.core as mx
    from mlx.optimizers import AdamW

    from common.model.step import collate, pack_lora, packed_loss_and_grads
    from common.training.memory import PAD_MULTIPLE
    from integration.lora_patch.memory import find_device
    from integration.lora_patch.vlm import encode, prepare_row

    multiple = PAD_MULTIPLE[find_device().backend]
    base, report = load_mlx(folder, dropout, bits), Report(folder)
    rows = [prepare_row(base, encode(base, *example)) for example in read_rows(folder)]
    base.model.vision_tower = None
    optimizer, values = AdamW(RATE, weight_decay=0.0, bias_correction=True), {"lora": pack_lora(base.model)}
    mx.eval(values)
    mx.clear_cache()
    mx.reset_peak_memory()
    for number in range(steps):
        start = time.perf_counter()
        batch = collate(base.model, [rows[number % len(rows)]], multiple)
        seed = (0, number) if dropout else None
        loss, n, grads = packed_loss_and_grads(
            base.model, batch, values["lora"], checkpointing=checkpointing, seed=seed
        )
        values = optimizer.apply_gradients({"lora": grads / n}, values)
        del grads, batch
        mx.eval(values, optimizer.state, loss)
        report.add(time.perf_counter() - start, loss.item() / n, mx.get_peak_memory())


def mlx_vlm_trainer(folder: Path, steps: int, checkpointing=False) -> None:
    """mlx-vlm's own `train`, on rows that its own dataset class would hand it, its loss on the response alone."""
    import mlx.core as mx
    from mlx.optimizers import AdamW
    from mlx_vlm.trainer.vlm.sft import trainer

    from integration.lora_patch.vlm import encode

    base, report, items = load_mlx(folder), Report(folder), []
    for example in read_rows(folder):
        encoded = encode(base, *example)
        ids = mx.array(encoded.input_ids)[None]
        items.append(
            {
                "input_ids": ids,
                "attention_mask": mx.ones_like(ids),
                "completion_mask": mx.array(encoded.completion_mask.astype(np.int32))[None],
                "pixel_values": mx.array(encoded.pixel_values),
                "image_grid_thw": mx.array(encoded.image_grid_thw),
            }
        )
    # Its batches come in random order; one after the other, as for everybody else.
    np.random.permutation = lambda n: np.arange(n)
    last = [time.perf_counter()]

    def note(info: dict, label: str) -> str:
        now = time.perf_counter()
        report.add(now - last[0], info["train_loss"], mx.get_peak_memory())
        last[0] = time.perf_counter()
        return label

    trainer.format_metric_report = note
    options = dict(iters=steps, batch_size=1, steps_per_report=1, steps_per_eval=10**9, steps_per_save=10**9)
    arguments = trainer.TrainingArgs(
        **options,
        max_seq_length=10**6,
        grad_checkpoint=checkpointing,
        grad_clip=None,
        adapter_file=str(folder / "mlx-vlm.safetensors"),
    )
    optimizer = AdamW(RATE, weight_decay=0.0, bias_correction=True)
    trainer.train(base.model, optimizer, items, args=arguments, train_on_completions=True)


def peft_trainer(folder: Path, steps: int, checkpointing=False) -> None:
    """transformers' Qwen3-VL with scaled-dot-product attention and PEFT's LoRA, in a plain loop with torch's AdamW."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import Qwen3VLForConditionalGeneration

    report, device = Report(folder), "cuda" if torch.cuda.is_available() else "cpu"
    config = json.loads((folder / "base/config.json").read_text())
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        folder / "base", dtype=getattr(torch, config["dtype"]), attn_implementation="sdpa"
    ).to(device)
    suffixes = "self_attn.(q_proj|k_proj|v_proj|o_proj)|mlp.(gate_proj|up_proj|down_proj)".replace(".", r"\.")
    target = rf"(.*\.)?language_model\.layers\.\d+\.({suffixes})"
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=target, task_type="CAUSAL_LM"))
    start = {}
    for name, value in load_file(folder / "lora.safetensors").items():
        module, part = name.replace("language_model.model", "model.language_model").rsplit(".", 1)
        start[f"base_model.model.{module}.lora_{part[-1].upper()}.default.weight"] = value.T
    missing = set(start) - set(model.state_dict())
    assert not missing, sorted(missing)[:2]
    model.load_state_dict(start, strict=False)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    batches = []
    for path in sorted(folder.glob("*.npz")):
        row = {name: torch.from_numpy(array)[None] for name, array in np.load(path).items()}
        ids = row["input_ids"].long()
        batches.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": (ids == config["image_token_id"]).int(),
                "pixel_values": row["pixel_values"][0],
                "image_grid_thw": row["image_grid_thw"][0].long(),
                "labels": torch.where(row["completion_mask"], ids, -100),
            }
        )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    for number in range(steps):
        began = time.perf_counter()
        batch = {name: value.to(device) for name, value in batches[number % len(batches)].items()}
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident_peak()
        report.add(time.perf_counter() - began, value, peak)


def unsloth_trainer(folder: Path, steps: int, compiled=True) -> None:
    """Unsloth's MLX trainer with its own defaults: compiled steps, chunked cross-entropy, checkpointing."""
    os.environ["UNSLOTH_ZOO_DISABLE_GPU_INIT"] = "1"  # outside macOS it would look for torch's GPU path first
    import mlx.core as mx
    from PIL import Image
    from unsloth_zoo.mlx.loader import FastMLXModel
    from unsloth_zoo.mlx.trainer import MLXTrainer, MLXTrainingConfig

    report = Report(folder)
    model, processor = FastMLXModel.from_pretrained(
        str(folder / "base"), max_seq_length=8192, load_in_4bit=False, load_in_16bit=True, text_only=False
    )
    model = FastMLXModel.get_peft_model(model, r=RANK, lora_alpha=ALPHA, lora_dropout=0.0)
    examples = []
    for prompt, response, path in json.loads((folder / "rows.json").read_text()):
        picture = {"type": "image", "image": Image.open(path).convert("RGB")}
        user = {"role": "user", "content": [picture, {"type": "text", "text": prompt}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": response}]}
        examples.append({"messages": [user, answer]})
    arguments = MLXTrainingConfig(
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=steps,
        warmup_steps=0,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_seq_length=8192,
        logging_steps=1,
        compile=compiled,
        train_on_completions=True,
        completion_only_loss=True,
        preserve_dataset_order=True,
        output_dir=str(folder / "unsloth"),
    )
    trainer = MLXTrainer(model=model, tokenizer=processor, processor=processor, train_dataset=examples, args=arguments)
    last = [time.perf_counter()]

    def note(step, total, loss, *rest):
        now = time.perf_counter()
        report.add(now - last[0], loss, mx.get_peak_memory())
        last[0] = time.perf_counter()

    trainer.add_step_callback(note)
    trainer.train()


def resident_peak() -> int:
    """The process's largest resident size so far: what torch on a CPU can be said to have needed."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
