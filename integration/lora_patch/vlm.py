"""The one file that touches mlx-vlm's internals: loading Qwen3-VL, examples to tokens, the frozen features, LoRA.

    from .vlm import encode, load_base, prepare_row
    base = load_base("Qwen/Qwen3-VL-4B-Instruct")
    row = prepare_row(base, encode(base, prompt, [photo], response))

Reads a model folder (or a hub id); writes nothing. Training (`common/model`) and generation compute with what this
file gives them: plain arrays and the static description of a decoder layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from .errors import LoraError, listed, one_line
from .files import read_json
from .hub import model_folder

LAYERS = "language_model.model.layers"  # the prefix of every trained module's name
END_OF_TURN = "<|im_end|>"
TARGET_MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

# Projections that share an input: one product with W, one with their A matrices, one dropout mask.
GROUPS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}


# -- the base ---------------------------------------------------------------------------------------------------------


@dataclass
class Base:
    """A loaded Qwen3-VL: mlx-vlm's model and processor, its config.json, and where it came from."""

    model: nn.Module
    processor: object
    config: dict
    path: Path
    name: str  # as the user typed it


def load_base(name_or_path: str | Path) -> Base:
    """Load a Qwen3-VL from a folder or from the hub (its cache first); the base is frozen and in evaluation mode.

    Raises `LoraError` for a folder without config.json, weights or tokenizer, another model type, or a name that is
    neither a folder nor reachable on the hub.
    """
    from mlx_vlm.utils import load  # mlx-vlm and transformers take a second to import; a script's --help needs neither

    name = str(name_or_path)
    path = model_folder(name)
    config = _read_config(path)
    try:
        model, processor = load(str(path))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:  # RuntimeError: MLX on damaged weights
        raise LoraError(f"{name}: the model cannot be loaded: {one_line(error)}") from error
    model.freeze()
    model.eval()
    group_weights(model)
    return Base(model, processor, config, path, name)


def _read_config(path: Path) -> dict:
    file = path / "config.json"
    if not file.is_file():
        raise LoraError(f"{path}: no config.json; this is not a model folder")
    config = read_json(file)
    if config.get("model_type") != "qwen3_vl":
        kind = config.get("model_type")
        raise LoraError(f"{file}: model_type is {kind!r}; only dense Qwen3-VL ('qwen3_vl') can be used")
    if not any(path.glob("*.safetensors")):
        raise LoraError(f"{path}: no *.safetensors weights beside config.json")
    return config


# -- examples to tokens -----------------------------------------------------------------------------------------------


Spans = Sequence[tuple[int, int]]  # [start, stop) in characters
SENTINEL = "\ufdd0"  # a character that no text may hold (Unicode 23.7), where a prompt's place is to be found


@dataclass
class Encoded:
    """One example as the model sees it. ``completion_mask`` marks the tokens that the loss counts."""

    input_ids: np.ndarray  # int32 [L]
    completion_mask: np.ndarray  # bool [L]: response and end of turn, less what is masked
    pixel_values: np.ndarray | None  # float32 [patches, 3 * 2 * patch * patch]
    image_grid_thw: np.ndarray | None  # int32 [images, 3], in patches

    def __len__(self) -> int:
        return len(self.input_ids)


def encode(base: Base, prompt: str, photos: list, response: str | None = None, masked_spans: Spans = ()) -> Encoded:
    """Turn photographs (PIL, RGB) and the full prompt text into tokens, exactly as the service sends them.

    One user message: the images, then the text, through the chat template with the generation prompt. With a
    ``response`` its tokens and the end of turn follow; the response is tokenized on its own, because that is where
    generation starts. Tokens that touch one of ``masked_spans`` are not marked in the completion mask. The name of a
    special token in prompt or response is text: it never becomes the token.
    """
    from mlx_vlm.prompt_utils import apply_chat_template
    from mlx_vlm.utils import process_inputs

    named = any(name in prompt for name in special_tokens(base))
    text = apply_chat_template(base.processor, base.config, SENTINEL if named else prompt, num_images=len(photos))
    head, _, tail = text.partition(SENTINEL) if named else (text, "", "")
    inputs = process_inputs(base.processor, [head], images=list(photos) or None, return_tensors="np")
    ids = np.asarray(inputs["input_ids"]).reshape(-1).astype(np.int32)
    if named:
        after = base.processor.tokenizer.encode(tail, add_special_tokens=False)
        ids = np.concatenate([ids, _text_tokens(base, prompt)[0], after]).astype(np.int32)
    mask = np.zeros(len(ids), dtype=bool)
    if response is not None:
        answer, supervised = response_tokens(base, response, masked_spans)
        ids, mask = np.concatenate([ids, answer]), np.concatenate([mask, supervised])
    if not photos:
        return Encoded(ids, mask, None, None)
    pixels = np.asarray(inputs["pixel_values"], dtype=np.float32)
    return Encoded(ids, mask, pixels, np.asarray(inputs["image_grid_thw"]).astype(np.int32))


def response_tokens(base: Base, response: str, masked_spans: Spans = ()) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens int32 [N], supervised bool [N]) of a response and the end of turn.

    A token is supervised unless it overlaps one of ``masked_spans``: [start, stop) in characters of the response.
    """
    ids, places = _text_tokens(base, response)
    supervised = [not any(a < stop and start < b for start, stop in masked_spans) for a, b in places]
    end = base.processor.tokenizer.convert_tokens_to_ids(END_OF_TURN)
    return np.array([*ids, end], dtype=np.int32), np.array([*supervised, True], dtype=bool)


def special_tokens(base: Base) -> list[str]:
    """Return the names of the tokenizer's special tokens, such as <|im_end|>."""
    return [token.content for token in base.processor.tokenizer.added_tokens_decoder.values() if token.special]


def _text_tokens(base: Base, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return (ids, [start, stop) in characters of each) of a text in which names of special tokens are text."""
    found = base.processor.tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    return found["input_ids"], found["offset_mapping"]


# -- what the frozen base makes constant ------------------------------------------------------------------------------


@dataclass
class Row:
    """One training row: tokens, and the frozen vision tower's features of its photographs, computed once.

    mlx-vlm recomputes the tower every step, and its `cached_image_features` path drops the deepstack features;
    both are kept here.
    """

    input_ids: np.ndarray  # int32 [L]
    completion_mask: np.ndarray  # bool [L]
    position_ids: np.ndarray  # int32 [3, L]: time, height, width of interleaved M-RoPE
    visual: np.ndarray  # int32 [N]: positions of the image tokens
    features: mx.array | None  # [N, D] in the dtype of the tower, or None without images
    deepstack: mx.array | None  # [K, N, D]: added to the hidden states after the first K layers

    def __len__(self) -> int:
        return len(self.input_ids)


def prepare_row(base: Base, encoded: Encoded) -> Row:
    """Compute the vision features (deepstack included) and the position ids of one encoded example."""
    config = base.model.config
    ids = mx.array(encoded.input_ids)[None]
    visual = np.flatnonzero(encoded.input_ids == config.image_token_id).astype(np.int32)
    features = deepstack = grid = None
    if encoded.pixel_values is not None:
        grid = mx.array(encoded.image_grid_thw)
        tower = base.model.vision_tower
        pixels = mx.array(encoded.pixel_values).astype(tower.patch_embed.proj.weight.dtype)
        features, levels = tower(pixels, grid)
        deepstack = mx.stack(levels) if levels else None
        mx.eval(features, deepstack)
        if len(features) != len(visual):
            raise ValueError(f"{len(visual)} image tokens for {len(features)} image features")
    positions, _ = base.model.language_model.get_rope_index(ids, grid)
    positions = np.array(positions).reshape(-1, len(encoded.input_ids))
    positions = np.broadcast_to(positions, (3, len(encoded.input_ids))).astype(np.int32)
    return Row(encoded.input_ids, encoded.completion_mask, positions, visual, features, deepstack)


# -- LoRA -------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class LoraModules:
    """A LoRA adapter as modules of mlx-vlm's around the base's own, which `use_adapter` puts in their place."""

    rank: int
    alpha: float
    dropout: float
    modules: dict[str, nn.Module]  # by full name
    phrasebook: object | None = None  # `phrasebook.Continuations` of its training responses, to draft from

    @property
    def scale(self) -> float:
        """What the update A B is multiplied by: alpha / rank."""
        return self.alpha / self.rank


def adapter_of(model: nn.Module) -> LoraModules | None:
    """Return the adapter that `use_adapter` put on the model, if any."""
    return getattr(model, "_adapter", None)


def linear_size(linear: nn.Module) -> tuple[int, int]:
    """Return (inputs, outputs) of a plain or quantized linear layer."""
    outputs, width = linear.weight.shape
    return width * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else width, outputs


def _child(module: nn.Module, name: str) -> nn.Module:
    for part in name.split("."):
        module = module[part]
    return module


# -- the decoder as plain arrays --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packing:
    """How a quantized matrix is stored; see `mx.quantize`."""

    group_size: int
    bits: int
    mode: str


@dataclass(frozen=True)
class LayerSpec:
    """All of a decoder layer that is not an array. Equal specs share compiled functions."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    packing: tuple[tuple[str, Packing | None], ...]  # per projection
    grouped: tuple[tuple[str, tuple[Packing | None, ...]], ...]  # per group: of each matrix that it is stored as
    widths: tuple[tuple[str, tuple[int, int]], ...]  # per projection: inputs, outputs
    lora: tuple[str, ...]  # the projections that have an adapter
    rank: int
    lora_scale: float
    dropout: float


@dataclass
class Decoder:
    """The language model as arrays: per layer a spec, its frozen arrays, and which modules have an adapter."""

    specs: list[LayerSpec]
    grouped: list[dict]  # {"input_norm": [D], ..., "qkv": [(weight,) or (weight, scales, biases), ...], ...}
    names: list[dict]  # {"q": full module name, ...} of the adapted projections
    norm: mx.array  # [D]
    eps: float
    head: tuple  # the output head, [V, D], as a projection is stored
    head_packing: Packing | None
    embed: nn.Module  # token ids -> [..., D]
    rotary: nn.Module  # (x, position ids [3, B, L]) -> cos, sin [B, L, head_dim] in x's dtype


_SHORT = {name: name.split(".")[1].removesuffix("_proj") for name in TARGET_MODULES}


def decoder(model: nn.Module) -> Decoder:
    """Return the language model's arrays as they stand now: with the adapter if it is on, else the base's alone."""
    adapter = adapter_of(model)
    text = model.language_model.model
    specs, grouped, names = [], [], []
    for i, (layer, groups) in enumerate(zip(text.layers, group_weights(model), strict=True)):
        attention = layer.self_attn
        norms = {
            "input_norm": layer.input_layernorm.weight,
            "post_norm": layer.post_attention_layernorm.weight,
            "q_norm": attention.q_norm.weight,
            "k_norm": attention.k_norm.weight,
        }
        packing, widths, full = [], [], {}
        for name, short in _SHORT.items():
            module = _child(layer, name)
            if "lora_a" in module:
                full[short] = f"{LAYERS}.{i}.{name}"
            packing.append((short, stored_matrix(_bare(module))[1]))
            widths.append((short, linear_size(_bare(module))))
        specs.append(
            LayerSpec(
                attention.n_heads,
                attention.n_kv_heads,
                attention.head_dim,
                text.args.rms_norm_eps,
                tuple(packing),
                tuple((group, tuple(how for _, how in stored)) for group, stored in groups.items()),
                tuple(widths),
                tuple(full),
                adapter.rank if full else 0,
                adapter.scale if full else 0.0,
                adapter.dropout if full else 0.0,
            )
        )
        grouped.append({**norms, **{group: [parts for parts, _ in stored] for group, stored in groups.items()}})
        names.append(full)
    tied = model.language_model.args.tie_word_embeddings
    head, head_packing = stored_matrix(text.embed_tokens if tied else model.language_model.lm_head)
    rotary = text.layers[0].self_attn.rotary_emb
    norm, eps = text.norm.weight, text.args.rms_norm_eps
    return Decoder(specs, grouped, names, norm, eps, head, head_packing, text.embed_tokens, rotary)


def group_weights(model: nn.Module) -> list[dict]:
    """Store the matrices of each group in `GROUPS` one below the other; return them, by layer and group.

    The modules' own weights become views of the stacked ones, so that nothing is held twice and the plain model works
    as before. Projections quantized in different ways stay apart. Done once; again if a module's weight was replaced.
    """
    found = getattr(model, "_groups", None) or [{} for _ in model.layers]
    for layer, groups in zip(model.layers, found, strict=True):
        for group, names in GROUPS.items():
            modules = [_bare(_child(layer, name)) for name, short in _SHORT.items() if short in names]
            stored = [stored_matrix(module) for module in modules]
            held = groups.get(group)
            if held is None or any(m.weight is not view for m, view in zip(modules, held[1], strict=True)):
                if len({how for _, how in stored}) == 1 and len(stored) > 1:
                    stored = [(_stack(modules), stored[0][1])]
                groups[group] = stored, [module.weight for module in modules]
    object.__setattr__(model, "_groups", found)
    return [{group: stored for group, (stored, _) in groups.items()} for groups in found]


def _stack(modules: list[nn.Module]) -> tuple:
    stacked = []
    for key in ("weight", "scales", "biases"):
        parts = [module[key] for module in modules if module.get(key) is not None]
        if parts:
            whole, ends = mx.concatenate(parts), np.cumsum([len(part) for part in parts]).tolist()
            mx.eval(whole)  # before the views, or each of them would compute it for itself
            views = [whole[end - len(part) : end] for part, end in zip(parts, ends, strict=True)]
            mx.eval(views)
            for module, view in zip(modules, views, strict=True):
                module[key] = view
            stacked.append(whole)
    return tuple(stacked)


def _bare(module: nn.Module) -> nn.Module:
    return module.linear if "lora_a" in module else module


def stored_matrix(module: nn.Module) -> tuple[tuple, Packing | None]:
    """Return (weight,) or (weight, scales, biases) of a layer or an embedding, and how it is packed."""
    if "bias" in module:
        raise ValueError("a decoder projection with a bias: not a Qwen3-VL")
    if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        biases = module.get("biases")
        parts = (module.weight, module.scales) if biases is None else (module.weight, module.scales, biases)
        return parts, Packing(module.group_size, module.bits, module.mode)
    return (module.weight,), None


# -- several adapters over one base, and mlx-vlm's own generation -----------------------------------------------------


def build_adapter(
    base: Base, tensors: dict[str, mx.array], rank: int, alpha: float, dropout: float = 0.0
) -> LoraModules:
    """Make the LoRA modules of a trained adapter without placing them; any number may exist over one base.

    ``tensors`` hold lora_a [in, r] and lora_b [r, out] by MLX name. Raises `LoraError` naming every module that the
    base lacks, whose shape differs or whose values are no numbers.
    """
    from mlx_vlm.trainer.peft import LoRALinear

    plain = {name: m for name, m in plain_modules(base.model).items() if f"{name}.lora_a" in tensors}
    names = {name.rpartition(".")[0] for name in tensors}
    problems = [f"{name}: the base has no such module" for name in sorted(names - plain.keys())]
    modules = {}
    for name, linear in plain.items():
        module = LoRALinear.from_base(linear, r=rank, dropout=dropout, scale=alpha / rank)
        for part in ("lora_a", "lora_b"):
            found, wanted = tensors[f"{name}.{part}"], module[part].shape
            if found.shape != wanted:
                problems.append(f"{name}.{part}: shape {found.shape}, the base needs {wanted}")
            if not mx.isfinite(found).all():
                problems.append(f"{name}.{part}: holds NaN or infinite values; the training run went wrong")
            # a transposed view of contiguous rows: the same numbers, a matrix-vector product twice as fast on CUDA
            module[part] = mx.contiguous(found.T).T
        module.freeze()
        module.train(False)
        modules[name] = module
    if problems:
        raise LoraError(listed(problems))
    mx.eval([[m.lora_a, m.lora_b] for m in modules.values()])
    return LoraModules(rank, alpha, dropout, modules)


def use_adapter(base: Base, adapter: LoraModules | None) -> None:
    """Put ``adapter`` in place of whichever adapter is on; None: the base alone. Nothing is copied."""
    current = adapter_of(base.model)
    modules = {name: module.linear for name, module in current.modules.items()} if current else {}
    modules |= adapter.modules if adapter else {}
    base.model.update_modules(tree_unflatten(list(modules.items())))
    object.__setattr__(base.model, "_adapter", adapter)


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the projections that LoRA can wrap, by full name, without the LoRA that may be around them."""
    found = {}
    for i, layer in enumerate(model.layers):
        for name in TARGET_MODULES:
            module = _child(layer, name)
            found[f"{LAYERS}.{i}.{name}"] = _bare(module)
    return found


def stop_tokens(base: Base) -> frozenset[int]:
    """Return the token ids that end a turn, as mlx-vlm's generation takes them."""
    return frozenset(base.processor.tokenizer.stopping_criteria.eos_token_ids)


def stream(base: Base, prompt: str, photos: list, max_tokens: int) -> Iterator[int]:
    """Yield greedy token ids one by one through mlx-vlm's own generation, as the service does; the end of turn is not
    yielded. Preparing the photograph is part of it."""
    from mlx_vlm.generate import stream_generate
    from mlx_vlm.prompt_utils import apply_chat_template

    text = apply_chat_template(base.processor, base.config, prompt, num_images=len(photos))
    results = stream_generate(
        base.model, base.processor, text, image=list(photos) or None, max_tokens=max_tokens, temperature=0.0
    )
    for result in results:
        if result.finish_reason is None and result.token is not None:
            yield int(result.token)
