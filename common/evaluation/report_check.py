"""Whether a comparison_report.json is whole: what is read back from a file that a hand may have changed."""

from collections.abc import Iterator

from common.schemas import OUTPUTS, Column, fault
from integration.lora_patch.json_text import is_number
from integration.lora_patch.specification import PromptSpecification

REPORT = {
    "created_at": Column("filled", "when it was made"),
    "settings": Column("object", "options of the evaluation"),
    "data": Column("object", "validation file"),
    "arms": Column("object", "what was compared, by arm"),
    "prompts": Column("object", "prompts of the examples, by name"),
    "examples": Column("objects", "held-out examples with every raw output"),
    "timings": Column("objects", "timed requests"),
    "summary": Column("object", "figures"),
    "gates": Column("objects", "gates with their verdicts"),
    "verdict": Column("object", "what the gates come to"),
}
PROMPT = {
    "text": Column("filled", "prompt"),
    "specification": Column("object", "what it demands"),
    "dimensions": Column("texts", "its dimensions"),
    "terms": Column("texts", "vocabulary of its advisor"),
    "example_scores": Column("numbers", "scores in its own example"),
}
EXAMPLE = {
    "index": Column("count", "row of the validation file from 0"),
    "prompt": Column("text", "name of its prompt"),
    "photographs": Column("objects", "path and SHA-256 of each"),
    "dimensions": Column("texts", "that the prompt asks for"),
    "response": Column("text", "reference"),
    "masked_spans": Column("spans", "characters of the reference that were not trained on"),
    "outputs": Column("object", "raw outputs by arm"),
    "loss": Column("object", "loss of the reference by arm"),
}
_PHOTOGRAPH = {"path": Column("path", "photograph"), "sha256": Column("hash", "of its bytes")}
_OUTPUT = {
    name: column if name != "tokens" else Column("count", column.meaning)
    for name, column in OUTPUTS["output"].items()
    if name not in ("arm", "example")
}
_LOSS = {name: OUTPUTS["loss"][name] for name in ("sum", "tokens")}
_FREE = {name: OUTPUTS["timing"][name] for name in ("seconds", "first_token_seconds", "tokens")}
_ARM = {"load_seconds": Column("number", "that loading took", needed=False, null=True)}


def report_fault(report: dict) -> str | None:
    """Say where a report is not what evaluation writes, None for a whole one."""
    problem = fault(report, REPORT)
    return problem or next((f"{where}: {text}" for where, text in _faults(report) if text), None)


def _faults(report: dict) -> Iterator[tuple[str, str | None]]:
    if "base" not in report["arms"] or "candidate" not in report["arms"]:
        yield "arms", "base and candidate are needed"
    if not is_number(report["settings"].get("temperature")):
        yield "settings", "temperature is no number"
    for name, arm in report["arms"].items():
        yield f"arms.{name}", fault(arm, _ARM)
    for name, prompt in report["prompts"].items():
        yield f"prompts.{name}", fault(prompt, PROMPT)
        yield f"prompts.{name}", _no_specification(prompt)
    for at, example in enumerate(report["examples"]):
        where = f"examples[{at}]"
        problem = fault(example, EXAMPLE)
        if not problem and example["prompt"] not in report["prompts"]:
            problem = "its prompt is not among the prompts"
        if not problem and report["arms"].keys() != example["outputs"].keys():
            problem = "outputs are not of the report's arms"
        yield where, problem
        for photograph in example["photographs"]:
            yield f"{where}.photographs", fault(photograph, _PHOTOGRAPH)
        for arm, outputs in example["outputs"].items():
            if not outputs and not report.get("recorded_outputs"):
                yield f"{where}.outputs.{arm}", "none, though the model was run"
            for output in outputs if isinstance(outputs, list) else [outputs]:
                yield f"{where}.outputs.{arm}", fault(output, _OUTPUT) or _no_numbers(output, "expected_scores")
        for arm, loss in example["loss"].items():
            yield f"{where}.loss.{arm}", fault(loss, _LOSS)
    for at, timing in enumerate(report["timings"]):
        yield f"timings[{at}]", fault(timing, OUTPUTS["timing"])
        yield f"timings[{at}]", fault(timing, {"peak_bytes": Column("count", "", needed=False, null=True)})
        if "free" in timing:
            yield f"timings[{at}].free", fault(timing["free"], _FREE)
    trained = report.get("training_scores")
    yield "training_scores", None if trained is None else fault(trained, {}) or _no_numbers(trained, "means")


def _no_specification(prompt: dict) -> str | None:
    try:
        PromptSpecification.from_dict(prompt["specification"])
    except ValueError as error:
        return str(error)


def _no_numbers(value: dict, key: str) -> str | None:
    scores = value.get(key)
    whole = scores is None or (isinstance(scores, dict) and all(map(is_number, scores.values())))
    return None if whole else f"{key} is not an object of numbers"
