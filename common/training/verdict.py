"""How a run went, in plain words: did the losses fall, which epoch was best, and what to do when they did not."""

import math


def loss_summary(log: list[dict], best_step: int | None, best_loss: float | None) -> dict:
    """Return the losses that a run is judged by, from its log and from the position in its checkpoint.

    Training losses are means over the first and the last tenth of the steps (at least one, at most twenty);
    ``val_loss_first`` is the base's, measured before the first step. What was not measured, or whose log is lost, is
    None.
    """
    train = [row["loss"] for row in log if row["kind"] == "train"]
    validation = {row["step"]: row["loss"] for row in log if row["kind"] == "validation"}
    some = min(20, max(1, len(train) // 10))
    return {
        "train_loss_first": _mean(train[:some]),
        "train_loss_last": _mean(train[-some:]),
        "val_loss_first": validation.get(0),
        "val_loss_best": best_loss,
        "val_loss_last": validation[max(validation)] if validation else None,
        "best_step": best_step,
    }


def verdict(losses: dict, step: int, steps_per_epoch: int, stopped_early: bool) -> list[str]:
    """Return the verdict as sentences, warnings last and marked."""
    lines, warnings = [], []
    first, last = losses["train_loss_first"], losses["train_loss_last"]
    if first is None:
        warnings.append("the log of this run is lost, so how the training loss developed is not known")
    elif step == 1:
        lines.append(f"Training loss was {first:.4f}; one step cannot tell whether it falls.")
    else:
        fell = last < first
        lines.append(f"Training loss {'fell' if fell else 'did not fall:'} from {first:.4f} to {last:.4f}.")
        if not fell:
            warnings.append("the adapter learned nothing: check --learning_rate and the data, or train more epochs")
    base, best, final = (losses[f"val_loss_{name}"] for name in ("first", "best", "last"))
    if best is None:
        warnings.append("there was no validation data, so whether this helps on new photographs is not known")
        return lines + [f"Warning: {line}." for line in warnings]
    at = losses["best_step"]
    where = f"{best:.4f} at step {at} (epoch {at / steps_per_epoch:.3g}), which is what is delivered."
    if base is None:
        lines.append(f"Validation loss was {where}")
        warnings.append("the base model's validation loss is lost: whether the adapter improves on it is not known")
    else:
        lines.append(
            f"Validation loss {'fell' if best < base else 'did not fall:'} from {base:.4f} (base model) to {where}"
        )
        if best >= base:
            warnings.append(
                "on photographs it has not seen the adapter is no better than the base model: more examples, fewer "
                "epochs or a lower --learning_rate may help; do not deploy it unevaluated"
            )
    if final is not None and at < step and final > best * 1.02:
        warnings.append(f"after step {at} validation loss rose to {final:.4f}: the later steps were overfitting")
    if stopped_early:
        lines.append(f"Stopped early after step {step}: validation loss no longer fell.")
    return lines + [f"Warning: {line}." for line in warnings]


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
