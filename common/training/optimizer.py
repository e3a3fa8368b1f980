"""AdamW over one flat vector, and the learning-rate schedule: what a training step does once gradients are known."""

import math

import mlx.core as mx


def learning_rate_at(step: int, total_steps: int, peak: float, warmup_steps: int) -> float:
    """Return the rate of ``step`` (from 0): linear warm-up to ``peak``, then half a cosine towards zero."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def warmup_within(warmup_steps: int, total_steps: int) -> int:
    """Return the warm-up that is used: as asked for, but never more than a tenth of the run."""
    return min(warmup_steps, total_steps // 10)


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with bias correction, in float32.

    All parameters are one vector (`step.pack_lora`): one kernel an operation instead of one for each of the hundreds of
    LoRA matrices, and one tensor a moment in a checkpoint. mlx.optimizers.AdamW over the same vector differs in the
    last digit, and with the part that skips a step it takes 39 primitives instead of 35.
    """

    def __init__(
        self,
        values: mx.array,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
    ):
        self.values, self.weight_decay, self.betas, self.epsilon = values, weight_decay, betas, epsilon
        self.first, self.second = mx.zeros_like(values), mx.zeros_like(values)
        self.updates = 0

    def update(self, gradient: mx.array, learning_rate: float, valid: mx.array) -> None:
        """Take one step down ``gradient`` (a vector like the values), or none where ``valid`` (bool []) is false.

        Lazy: evaluate `state()` after it. The device decides by ``valid``, so that a gradient which is not a number
        never reaches the weights, without the host having to wait for its norm first.
        """
        self.updates += 1
        beta1, beta2 = self.betas
        first = beta1 * self.first + (1 - beta1) * gradient
        second = beta2 * self.second + (1 - beta2) * gradient * gradient
        spread = mx.sqrt(second / (1 - beta2**self.updates)) + self.epsilon
        change = first / (1 - beta1**self.updates) / spread + self.weight_decay * self.values
        self.values = mx.where(valid, self.values - learning_rate * change, self.values)
        self.first = mx.where(valid, first, self.first)
        self.second = mx.where(valid, second, self.second)

    def state(self) -> dict[str, mx.array]:
        """Return what a checkpoint must hold to resume exactly."""
        return {"values": self.values, "first": self.first, "second": self.second}

    def restore(self, state: dict[str, mx.array], updates: int) -> None:
        """Take over a state that `state` gave after ``updates`` updates."""
        self.values, self.first, self.second = (state[name] for name in ("values", "first", "second"))
        self.updates = updates


def clip(gradient: mx.array, max_norm: float) -> tuple[mx.array, mx.array]:
    """Return (gradient scaled to at most ``max_norm``, its norm before); a ``max_norm`` of 0 leaves it as it is."""
    norm = mx.sqrt((gradient * gradient).sum())
    if not max_norm:
        return gradient, norm
    return gradient * mx.minimum(1.0, max_norm / (norm + 1e-6)), norm
