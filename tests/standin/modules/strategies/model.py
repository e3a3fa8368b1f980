"""The one model of the process, loaded when this module is imported."""

import os
import threading

from mlx_vlm import apply_chat_template
from mlx_vlm import generate as mlx_generate
from mlx_vlm import load as mlx_load


class ModelManager:
    def __init__(self, name):
        self.generate = mlx_generate
        self.model, self.processor = mlx_load(name)


manager = ModelManager(os.environ["MLX_MODEL"])


def ask(prompt, path):
    formatted = apply_chat_template(manager.processor, manager.model.config, prompt, num_images=1)
    answer = {}

    def work():
        limit = int(os.environ["MAX_TOKENS"])
        result = manager.generate(
            manager.model, manager.processor, formatted, [path], max_tokens=limit, temperature=0.0
        )
        answer["text"] = result.text

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout=300)
    return answer["text"]
