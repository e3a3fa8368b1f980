"""The engine bound to the adapter that is on: the former interface, for callers that have not moved to `Engine` yet."""

from .engine import Engine, Request, Sampling, answer_text, prompt_row  # noqa: F401
from .grammar import Grammar, answer_schema  # noqa: F401
from .vlm import adapter_of


class Decoding:
    """Answers with the adapter that is on when this is made; one engine a model."""

    def __init__(self, base):
        module = base.model.layers[0].self_attn.q_proj
        weight = (module.linear if "lora_a" in module else module).weight
        held = getattr(base.model, "_engine", None)
        if held is None or held[1] is not weight:
            engine = Engine(base)  # which may put the weights in another place
            held = engine, (module.linear if "lora_a" in module else module).weight
            object.__setattr__(base.model, "_engine", held)
        self.engine, adapter = held[0], adapter_of(base.model)
        self.adapter = adapter if adapter is not None and adapter.on else None
        self.text = self.engine.text

    def generate(self, requests, batch_size, max_tokens, temperature=0.0, seed=0):
        return self.engine.generate(requests, batch_size, max_tokens, Sampling(temperature, seed), self.adapter)

    def stream(self, request, max_tokens):
        return self.engine.stream(request, max_tokens, self.adapter)
