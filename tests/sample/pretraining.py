"""A short pre-training of the tiny base: its language model learns to read pictures and to write critiques.

make_tiny_model.py calls pretrain(). The texts are generic: what can be measured in a picture; what a master once said
of another picture of the same subject, which teaches the words but not when they are true; and critiques for advisors
other than ansel, in the service's format, but generous and in the same words for every dimension. Real base models
have such habits too. What tuning adds is the advisor: honest scores and comments that fit the picture.
The vision tower keeps its random weights, which tell pictures apart well enough; only the last layer of each merger
is set by the data, so that image tokens have the mean and the spread of text tokens.
"""

import json
import random
import time
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_vlm.prompt_utils import apply_chat_template
from tqdm import tqdm

from tests.sample import scenes
from tests.sample.make_tree import ADVISORS, sample_prompt

PICTURES = 512  # drawn once, met several times, upright every fourth
BATCH_SIZE = 8
LOG2_E = 1.4426950408889634
LEARNING_RATE = 1.5e-3

TASKS = ("measure", "recall", "critique")
MEASURE_PROMPT = "Measure the photograph."
RECALL_PROMPT = "Recall what a master said of such a subject."
# for a low, a middling and a high score: adjective, advice
GENERIC = (("weak", "Try to improve"), ("fair", "Try to vary"), ("strong", "Try to keep"))


def measurement(scene: scenes.Scene) -> str:
    """What can be measured in the picture, in one line."""
    return (
        f"{scene.kind}; light {round(9 * scene.light)}, color {round(9 * scene.color)}, "
        f"sharpness {round(9 * scene.sharp)}, {scenes.side(scene)}."
    )


def generic_critique(scene: scenes.Scene) -> str:
    """A critique in the service's format, no score below 5, in the same words for every dimension."""
    dimensions = []
    for name, score in zip(scenes.DIMENSIONS, scenes.scores(scene), strict=True):
        adjective, advice = GENERIC[scenes.level(score)]
        dimensions.append(
            {
                "name": name,
                "score": 4 + (score + 1) // 2,
                "comment": f"The {name.lower()} of this {scene.kind} is {adjective}.",
                "recommendation": f"{advice} the {name.lower()} of the {scene.kind} in the next photograph.",
            }
        )
    shown = [dimension["score"] for dimension in dimensions]
    best = sorted(range(len(shown)), key=lambda i: (-shown[i], i))
    critique = {
        "image_description": f"This is a photograph of a {scene.kind}.",
        "dimensions": dimensions,
        "overall_score": round(sum(shown) / len(shown), 1),
        "key_strengths": [f"The {scenes.DIMENSIONS[i].lower()} is good." for i in best[:2]],
        "priority_improvements": [f"The {scenes.DIMENSIONS[i].lower()} can be better." for i in best[:-3:-1]],
        "technical_notes": "No technical problems can be seen.",
    }
    return json.dumps(critique, ensure_ascii=False, separators=(",", ":"))


def recollection(rng: random.Random, scene: scenes.Scene) -> str:
    """A critique by the sample's Adams of another picture of the same kind."""
    other = replace(scenes.random_scene(rng), kind=scene.kind, sharp=rng.random(), color=rng.random())
    return json.dumps(scenes.critique(other), ensure_ascii=False, separators=(",", ":"))


@dataclass
class Picture:
    """A drawn scene as the frozen vision tower sees it; n image tokens of width d."""

    scene: scenes.Scene
    grid: np.ndarray  # time, height, width in patches
    features: np.ndarray  # [n, d]
    deepstack: list[np.ndarray]  # one [n, d] for each of the first layers


def pretrain(model, processor, config: dict, steps: int, seconds: float, seed: int) -> None:
    """Train the language model for a number of steps; fewer, and it says so, when the time is up before."""
    rng = random.Random(seed)
    pictures = look(model, processor, rng)
    trained = model.language_model
    loss_and_gradients = nn.value_and_grad(trained, batch_loss)
    warm_up = max(1, steps // 20)
    optimizer = optim.AdamW(
        optim.join_schedules(
            [
                optim.linear_schedule(0.0, LEARNING_RATE, warm_up),
                optim.cosine_decay(LEARNING_RATE, max(1, steps - warm_up), LEARNING_RATE / 20),
            ],
            [warm_up],
        ),
        weight_decay=0.01,
    )
    losses, deadline = {}, time.monotonic() + seconds
    with tqdm(total=steps, desc="pre-training the base", unit="step") as bar:
        for step in range(steps):
            task = TASKS[step % len(TASKS)]
            upright = rng.random() < 0.25
            rows = rng.sample([picture for picture in pictures if picture.scene.upright == upright], BATCH_SIZE)
            batch = make_batch(processor, config, rows, [text(rng, row.scene, task) for row in rows])
            loss, gradients = loss_and_gradients(trained, batch)
            gradients, _ = optim.clip_grad_norm(gradients, 1.0)
            optimizer.update(trained, gradients)
            mx.eval(loss, trained.parameters(), optimizer.state)
            losses[task] = f"{loss.item():.2f}"
            bar.set_postfix(losses, refresh=False)
            bar.update()
            if time.monotonic() > deadline:
                bar.write(f"pre-training stops at step {step + 1}: its {seconds:.0f} s are over")
                break


def text(rng: random.Random, scene: scenes.Scene, task: str) -> tuple[str, str]:
    """A prompt and its answer."""
    if task == "measure":
        return MEASURE_PROMPT, measurement(scene)
    if task == "recall":
        return RECALL_PROMPT, recollection(rng, scene)
    return sample_prompt(rng.choice([advisor for advisor in ADVISORS if advisor != "ansel"])), generic_critique(scene)


def look(model, processor, rng: random.Random) -> list[Picture]:
    """Draw the pictures, fit the mergers to them and return what the tower makes of each."""
    drawn, tower = [], model.vision_tower
    for index in tqdm(range(PICTURES), desc="pictures to learn from", unit="picture"):
        scene = replace(scenes.random_scene(rng), upright=index % 4 == 0)
        seen = processor.image_processor(images=[scenes.draw(scene, 160)])
        drawn.append((scene, seen["pixel_values"], seen["image_grid_thw"]))
    spread = mx.std(model.language_model.model.embed_tokens.weight).item()
    for place, merger in enumerate([tower.merger, *tower.deepstack_merger_list]):
        fit_merger(merger, np.concatenate([see(tower, *shot[1:])[place] for shot in drawn[:128]]), spread)
    pictures = []
    for scene, pixels, grid in drawn:
        features, *deepstack = see(tower, pixels, grid)
        pictures.append(Picture(scene, grid[0], features, deepstack))
    return pictures


def see(tower, pixels: np.ndarray, grid: np.ndarray) -> list[np.ndarray]:
    """The image tokens of one picture, then its deepstack features: [n, d] each."""
    features, deepstack = tower(mx.array(pixels), mx.array(grid))
    return [np.array(features), *(np.array(layer) for layer in deepstack)]


def fit_merger(merger, outputs: np.ndarray, spread: float) -> None:
    """Set a merger's last layer so that its outputs [n, d] have mean 0, deviation `spread` and little correlation."""
    mean = outputs.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(outputs - mean, rowvar=False))
    # directions that hardly vary are not blown up to full size
    whiten = spread * vectors @ np.diag(1 / np.sqrt(values + 0.03 * values.mean())) @ vectors.T
    layer = merger.linear_fc2
    layer.bias = mx.array((whiten @ (np.array(layer.bias) - mean)).astype(np.float32))
    layer.weight = mx.array((whiten @ np.array(layer.weight)).astype(np.float32))


def make_batch(processor, config: dict, rows: list[Picture], texts: list[tuple[str, str]]) -> dict:
    """Token ids [b, l] padded on the right, the answers' mask [b, l - 1], and the pictures' features [b, n, d]."""
    count, fronts, sequences = len(rows[0].features), [], []
    for prompt, answer in texts:
        prompt = apply_chat_template(processor, config, prompt, num_images=1)
        front = processor.tokenizer(prompt.replace("<|image_pad|>", "<|image_pad|>" * count))["input_ids"]
        fronts.append(len(front))
        sequences.append(front + processor.tokenizer(answer + "<|im_end|>")["input_ids"])
    ids = np.zeros((len(rows), max(map(len, sequences))), dtype=np.int32)
    mask = np.zeros((len(rows), ids.shape[1] - 1), dtype=np.float32)
    for row, (front, sequence) in enumerate(zip(fronts, sequences, strict=True)):
        ids[row, : len(sequence)] = sequence
        mask[row, front - 1 : len(sequence) - 1] = 1
    first = sequences[0].index(config["image_token_id"])
    return {
        "ids": mx.array(ids),
        "mask": mx.array(mask),
        "image": slice(first, first + count),
        "answers": min(fronts) - 1,  # no answer's first token is predicted before here
        "grid": mx.array(rows[0].grid[None]),
        "features": mx.array(np.stack([row.features for row in rows])),
        "deepstack": [mx.array(np.stack(layer)) for layer in zip(*(row.deepstack for row in rows), strict=True)],
    }


def batch_loss(language, batch: dict) -> mx.array:
    """Mean cross-entropy over the answers' tokens; padding on the right needs no mask, attention looks back."""
    ids, image = batch["ids"], batch["image"]
    h = language.model.embed_tokens(ids)
    h = mx.concatenate([h[:, : image.start], batch["features"], h[:, image.stop :]], axis=1)
    positions, _ = language.get_rope_index(ids[:1], batch["grid"])
    positions = mx.broadcast_to(positions, (3, *ids.shape))
    for index, layer in enumerate(language.model.layers):
        h = layer(h, "causal", None, positions)
        if index < len(batch["deepstack"]):
            seen = h[:, image] + batch["deepstack"][index]
            h = mx.concatenate([h[:, : image.start], seen, h[:, image.stop :]], axis=1)
    start = batch["answers"]
    logits = language.model.embed_tokens.as_linear(language.model.norm(h[:, start:-1]))
    wanted = mx.take_along_axis(logits, ids[:, start + 1 :, None], axis=-1)[..., 0]
    # the log of the sum of exponentials: MLX takes powers of 2 on the CPU several times as fast as exp
    top = mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    losses = mx.log(mx.power(2.0, (logits - top) * LOG2_E).sum(axis=-1)) + top[..., 0] - wanted
    mask = batch["mask"][:, start:]
    return (losses * mask).sum() / mask.sum()
