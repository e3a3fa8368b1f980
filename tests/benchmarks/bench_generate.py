"""Time batched generation against one at a time, with and without an adapter, on a model of random weights.

    python tests/benchmarks/bench_generate.py                                  # a tiny shape, any machine
    python tests/benchmarks/bench_generate.py --shape 4b --tokens 384          # Qwen3-VL-4B's, bfloat16, a GPU

Prints a table (tokens/s and seconds an answer, vision and prefill included; peak memory; ratios to mlx-vlm's one by
one) and compares the greedy tokens of the batch with those of one by one: where they part, how far apart the two
tokens' logits lay, against the rounding of the model's dtype. Reads and writes no files.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import click
import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_vlm.generate import generate_step
from mlx_vlm.models.qwen3_vl import Model, ModelConfig, TextConfig, VisionConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.model.lora import attach_lora, lora_parameters  # noqa: E402
from integration.lora_patch import generation as generate
from integration.lora_patch import vlm  # noqa: E402

SHAPES = {
    "tiny": {
        "text": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
                 "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 4096},
        "rope": [6, 5, 5],
        "vision": {"depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 256,
                   "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        "dtype": mx.float32, "grid": (8, 8), "prompt": 96,
    },
    "4b": {
        "text": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
        "rope": [24, 20, 20],
        "vision": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
                   "out_hidden_size": 2560, "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17]},
        "dtype": mx.bfloat16, "grid": (48, 64), "prompt": 992,
    },
}  # fmt: skip


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--shape", type=click.Choice(list(SHAPES)), default="tiny", show_default=True)
@click.option("--tokens", default=96, show_default=True, help="tokens of each answer")
@click.option("--batch_size", default=8, show_default=True)
@click.option("--singles", default=2, show_default=True, help="answers generated one by one")
@click.option("--rank", default=16, show_default=True, help="of the adapter, on all seven projections")
def main(shape: str, tokens: int, batch_size: int, singles: int, rank: int) -> None:
    generate.LOOP_CHECK = 1 << 60  # random weights repeat themselves; here every answer has its full length
    base = random_base(SHAPES[shape])
    photos = [photo(SHAPES[shape], base, number) for number in range(batch_size)]
    adapters = {"base": None, "adapter": random_adapter(base, rank)}
    rows, outputs = [], {}
    for name, adapter in adapters.items():
        vlm.use_adapter(base, adapter)
        for way, run, count in (
            ("mlx-vlm, one by one", mlx_vlm_answers, singles),
            ("one by one", single_answers, singles),
            (f"batch of {batch_size}", batch_answers, batch_size),
        ):
            run(base, photos[:count], 8)  # compiles the kernels
            mx.reset_peak_memory()
            start = time.perf_counter()
            found = run(base, photos[:count], tokens)
            seconds = time.perf_counter() - start
            outputs[name, way] = found
            rows.append((name, way, count * tokens / seconds, seconds / count, mx.get_peak_memory() / 1e9))
            print(f"  {name}, {way}: {count} answers in {seconds:.2f} s", file=sys.stderr)
    print_table(rows)
    for name, adapter in adapters.items():
        vlm.use_adapter(base, adapter)
        single = outputs[name, "one by one"]
        compare("mlx-vlm's", outputs[name, "mlx-vlm, one by one"], single, base, photos, name)
        compare(f"the batch of {batch_size}'s", outputs[name, f"batch of {batch_size}"], single, base, photos, name)
    print(json.dumps({"device": str(mx.device_info()), "mlx": mx.__version__}))


def random_base(shape: dict) -> vlm.Base:
    """Return a base of random weights in the shape's dtype; its stop tokens are none."""
    text = dict(
        model_type="qwen3_vl_text", rms_norm_eps=1e-6, max_position_embeddings=32768, rope_theta=5_000_000,
        rope_scaling={"mrope_interleaved": True, "mrope_section": shape["rope"], "rope_type": "default"},
        tie_word_embeddings=True, attention_bias=False, hidden_act="silu", **shape["text"],
    )  # fmt: skip
    vision = dict(model_type="qwen3_vl", in_channels=3, patch_size=16, spatial_merge_size=2, temporal_patch_size=2,
                  hidden_act="gelu_pytorch_tanh", initializer_range=0.02, **shape["vision"])  # fmt: skip
    ids = dict(image_token_id=10, video_token_id=11, vision_start_token_id=12, vision_end_token_id=13)
    config = {"model_type": "qwen3_vl", "tie_word_embeddings": True, "vocab_size": text["vocab_size"], **ids}
    parts = {"text_config": TextConfig.from_dict(text), "vision_config": VisionConfig.from_dict(vision)}
    mx.random.seed(0)
    model = Model(ModelConfig.from_dict({**config, **parts}))
    for module in (model.vision_tower, model.language_model):  # cast part by part: float32 copies must not pile up
        module.update(tree_map(lambda weight: weight.astype(shape["dtype"]), module.parameters()))
        mx.eval(module.parameters())
    model.freeze()
    model.eval()
    stopping = SimpleNamespace(eos_token_ids=[])
    processor = SimpleNamespace(tokenizer=SimpleNamespace(stopping_criteria=stopping))
    return vlm.Base(model, processor, config, Path("."), "random")


def photo(shape: dict, base: vlm.Base, number: int) -> vlm.Encoded:
    """Return an encoded prompt: a random photograph, then random text, some tokens longer for each number."""
    rng = np.random.default_rng(number)
    height, width = shape["grid"]
    image = np.full(height * width // 4, 10)
    text = rng.integers(20, shape["text"]["vocab_size"], shape["prompt"] + 3 * number)
    ids = np.concatenate([[12], image, [13], text]).astype(np.int32)
    pixels = rng.normal(0, 1, (height * width, 3 * 2 * 16 * 16)).astype(np.float32)
    return vlm.Encoded(ids, np.zeros(len(ids), dtype=bool), pixels, np.array([[1, height, width]], dtype=np.int32))


def random_adapter(base: vlm.Base, rank: int) -> vlm.Adapter:
    attach_lora(base, rank=rank, alpha=2 * rank)
    tensors = lora_parameters(base.model)
    for name in tensors:
        if name.endswith("lora_b"):
            tensors[name] = 0.01 * mx.random.normal(tensors[name].shape)
    vlm.use_adapter(base, None)
    return vlm.build_adapter(base, tensors, rank, 2 * rank)


def mlx_vlm_answers(base: vlm.Base, photos: list[vlm.Encoded], tokens: int) -> list[list[int]]:
    """Generate as mlx-vlm does, one photograph after another."""
    found = []
    for encoded in photos:
        ids, grid = mx.array(encoded.input_ids)[None], mx.array(encoded.image_grid_thw)
        steps = generate_step(
            ids, base.model, mx.array(encoded.pixel_values), None, max_tokens=tokens, temperature=0.0,
            image_grid_thw=grid,
        )  # fmt: skip
        found.append([int(token) for token, _ in steps])
    return found


def single_answers(base: vlm.Base, photos: list[vlm.Encoded], tokens: int) -> list[list[int]]:
    return [batch_answers(base, [encoded], tokens)[0] for encoded in photos]


def batch_answers(base: vlm.Base, photos: list[vlm.Encoded], tokens: int) -> list[list[int]]:
    decoding = generate.Decoding(base)
    requests = [generate.Request(vlm.prepare_row(base, encoded), str(at)) for at, encoded in enumerate(photos)]
    answers = {answer.key: answer.tokens for answer in decoding.generate(requests, len(photos), tokens)}
    return [answers[str(at)] for at in range(len(photos))]


def compare(whose: str, found: list, single: list, base: vlm.Base, photos: list, name: str) -> None:
    """Print how far two sets of greedy tokens agree and what was between the tokens where they part."""
    same, gaps = 0, []
    for encoded, ours, theirs in zip(photos, found, single, strict=False):
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if at is None:
            same += 1
            continue
        logits = logits_after(base, encoded, theirs[:at])
        gaps.append((at, abs(float(logits[ours[at]] - logits[theirs[at]])), float(mx.abs(logits[theirs[at]]))))
    count = min(len(found), len(single))
    print(f"{name}: {whose} greedy tokens and one by one's: {same} of {count} answers identical")
    for at, gap, size in gaps:
        print(
            f"  part at token {at}: logits {gap:.4f} apart at {size:.3f}; bfloat16 steps there are {size * 2**-8:.4f}"
        )


def logits_after(base: vlm.Base, encoded: vlm.Encoded, tokens: list[int]) -> mx.array:
    """Return mlx-vlm's logits [V], float32, after a prompt and some tokens, without a cache."""
    ids = mx.array(np.concatenate([encoded.input_ids, np.array(tokens, dtype=np.int32)]))[None]
    out = base.model(ids, mx.array(encoded.pixel_values), image_grid_thw=mx.array(encoded.image_grid_thw))
    return out.logits[0, -1].astype(mx.float32)


def print_table(rows: list[tuple]) -> None:
    print(f"{'':10}{'way':24}{'tokens/s':>10}{'s/answer':>10}{'peak GB':>10}{'x mlx-vlm':>11}")
    for name, way, rate, seconds, peak in rows:
        reference = next(row[2] for row in rows if row[0] == name and row[1].startswith("mlx-vlm"))
        print(f"{name:10}{way:24}{rate:10,.1f}{seconds:10.2f}{peak:10.2f}{rate / reference:11.2f}")


if __name__ == "__main__":
    main()
