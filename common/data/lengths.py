"""How many tokens an example takes, from the base model's tokenizer alone: no model, no mlx, no network.

counter = LengthCounter(base_model, max_image_size)
tokens = counter.count(prompt, response, (width, height))
"""

import json
import math

from integration.lora_patch.hub import local_file

TEMPLATE_TOKENS = 12  # role marks, vision marks, end of turn
CHARACTERS_PER_TOKEN = 4.0  # of English JSON, where there is no tokenizer to ask
_QWEN3_VL = {"patch_size": 16, "merge_size": 2, "size": {"shortest_edge": 65536, "longest_edge": 16777216}}


class LengthCounter:
    """Counts the tokens of examples; ``exact`` is False where they are estimated from characters."""

    def __init__(self, base_model: str, max_image_size: int):
        self._tokenizer, self._processor = _local_files(base_model)
        self.exact = self._tokenizer is not None
        self._max_image_size = max_image_size
        self._prompts: dict[str, int] = {}

    def count(self, prompt: str, response: str, size: tuple[int, int]) -> int:
        """Return the tokens of one example; ``size`` is the photograph's (width, height)."""
        if prompt not in self._prompts:
            self._prompts[prompt] = self._text(prompt)
        return self._prompts[prompt] + self.image(size) + self._text(response) + TEMPLATE_TOKENS

    def _text(self, text: str) -> int:
        if self._tokenizer is None:
            return math.ceil(len(text) / CHARACTERS_PER_TOKEN)
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def image(self, size: tuple[int, int]) -> int:
        """Return the tokens of a photograph: Qwen3-VL's resizing, after `load_photo` has bounded the long side."""
        scale = min(1.0, self._max_image_size / max(size))
        width, height = (max(1, round(side * scale)) for side in size)
        factor = self._processor["patch_size"] * self._processor["merge_size"]
        least, most = (self._processor["size"][edge] for edge in ("shortest_edge", "longest_edge"))
        rows, columns = max(1, round(height / factor)), max(1, round(width / factor))
        if rows * columns * factor**2 > most:
            shrink = math.sqrt(height * width / most)
            rows, columns = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
        elif rows * columns * factor**2 < least:
            grow = math.sqrt(least / (height * width))
            rows, columns = (math.ceil(side * grow / factor) for side in (height, width))
        return rows * columns


def _local_files(base_model: str) -> tuple[object | None, dict]:
    """Return (tokenizer or None, preprocessor settings) of a model folder or of the hub's local cache."""
    tokenizer, processor = (local_file(base_model, name) for name in ("tokenizer.json", "preprocessor_config.json"))
    settings = dict(_QWEN3_VL)
    if processor:
        try:
            own = json.loads(processor.read_text(encoding="utf-8"))
            settings |= {key: own[key] for key in settings if isinstance(own.get(key), type(settings[key]))}
            settings["size"] = {**_QWEN3_VL["size"], **settings["size"]}
        except (OSError, ValueError):
            pass
    if tokenizer is None:
        return None, settings
    from tokenizers import Tokenizer  # takes half a second, and only those with a tokenizer need it

    try:
        return Tokenizer.from_file(str(tokenizer)), settings
    except Exception:  # the library raises bare Exception for a damaged file
        return None, settings
