"""Putting a version in use and going back: the record that the service reads, and the history beside it.

models/ansel/deployed.json is replaced as a whole, with every promotion and rollback. models/ansel/history.jsonl gains
a line each time and is never rewritten: when, who, which version, from what report (SHA-256), by which rule.
"""

import datetime
import fcntl
import getpass
import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, refuse
from common.evaluation.comparison import read_report, recomputed
from common.evaluation.gates import DEFAULT_GATES, Gate, bound_text, from_dicts, load_gates
from common.files import jsonl_writer, read_rows, write_atomic, write_json, write_text
from integration.lora_patch.adapters import read_adapter
from integration.lora_patch.sources import adapter_in
from integration.lora_patch.versions import (
    ARGS,
    NO_VERSION,
    SCHEMA_VERSION,
    adapter_hashes,
    check_unchanged,
    find_versions,
    read_record,
    record_path,
    training_args,
    version_folder,
)

HISTORY = "history.jsonl"


@dataclass(frozen=True)
class Rule:
    """Which verdicts put a version in use, and the gates file that stands in for the report's own gates."""

    strict: bool = False  # only "pass" promotes; otherwise "likely" does too
    gates: Path | None = None

    def judge(self, report: dict) -> dict:
        """Return a report computed again from its raw outputs, and decided by this rule."""
        return recomputed(report, self.wanted(report), self.strict)

    def wanted(self, report: dict) -> list[Gate]:
        """Return the gates that decide."""
        return load_gates(self.gates) if self.gates else from_dicts(report["gates"])

    def describe(self, report: dict) -> str:
        """Return the rule in words, as record and history keep it."""
        text = "every gate pass" + ("" if self.strict else " or likely")
        changes = [change for gate in self.wanted(report) if (change := gate_change(gate))]
        return text + (f"; {'; '.join(changes)}" if changes else "")


def gate_change(gate: Gate) -> str | None:
    """Say how a gate differs from its default; None where it does not."""
    default = {gate.name: gate for gate in DEFAULT_GATES}.get(gate.name)
    if gate.enabled != (default.enabled if default else True):
        return f"gate {gate.name} was switched {'on' if gate.enabled else 'off'}"
    if default and gate.enabled and gate.bound != default.bound:
        texts = (bound_text(vars(which)) for which in (gate, default))
        return "gate {} was {}, where the default is {}".format(gate.name, *texts)
    return None


@contextmanager
def locked(models: Path, advisor: str) -> Iterator[None]:
    """Keep a second promotion, rollback or round for the same advisor out."""
    place = record_path(models, advisor).parent
    place.mkdir(parents=True, exist_ok=True)
    with open(place / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{place}: another round, promotion or rollback is running; wait for it") from error
        yield


def promote(models: Path, advisor: str, number: int, report_path: Path, rule: Rule) -> tuple[dict, bool]:
    """Put a version in use if its report, computed again from its raw outputs, meets the rule.

    Returns the record, and whether it is a new one: a version that is in use already stays so.

    UserError, all reasons in one, for a gate that objects, a report of another adapter or made from recorded outputs,
    one that compared with another version than the one in use now, or files that changed since.
    """
    folder, place = version_folder(models, advisor, number), record_path(models, advisor)
    if not (folder / ARGS).is_file():
        have = ", ".join(f"v{n}" for n in find_versions(models, advisor)) or "none"
        raise UserError(f"{folder}: there is no finished version v{number} of {advisor} (there are: {have})")
    read_adapter(adapter_in(folder))
    current, report = read_record(place), read_report(report_path)
    if current and current["adapter"] and current["sha256"] == adapter_hashes(folder):
        return current, False
    verdict = rule.judge(report)["verdict"]
    problems = list(verdict["failed"])
    if report.get("recorded_outputs"):
        problems.append("the report was made from recorded outputs, not by running the model")
    if report["arms"].get("candidate", {}).get("sha256") != adapter_hashes(folder):
        problems.append(f"the report is of another adapter than {folder}, or the adapter's files have changed since")
    compared = report["arms"].get("deployed", {}).get("sha256")
    if current and current["adapter"] and compared != current["sha256"]:
        problems.append(f"the report does not compare with {current['version']}, which is in use; evaluate again")
    if problems:
        keeps = f"{current['version']} stays in use" if current and current["adapter"] else "nothing is in use"
        refuse([f"{report_path}: v{number} of {advisor} is not promoted, {keeps}", *problems])
    kept, digest = keep_report(models, advisor, number, report_path)
    decision = {"rule": rule.describe(report), "verdict": verdict["word"]}
    decision |= {"report": kept.relative_to(place.parent).as_posix(), "report_sha256": digest}
    record = new_record(models, advisor, number, decision, [_without_history(current)] if current else [])
    record["history"] += current["history"] if current else []
    _put(place, "promoted", current, record)
    return record, True


def rollback(models: Path, advisor: str) -> tuple[dict, dict]:
    """Put the version before the present one in use again (the base alone, if there is none); return (old, new)."""
    place = record_path(models, advisor)
    current = read_record(place)
    if current is None or current["adapter"] is None:
        raise UserError(f"{place}: no version of {advisor} is in use, so there is nothing to go back from")
    earlier, *rest = current["history"] or [None]
    if earlier is None or earlier["adapter"] is None:
        record = nothing_in_use(advisor)
    else:
        check_unchanged(place.parent / earlier["adapter"], earlier["sha256"], f"{earlier['version']} cannot be used:")
        record = earlier | _when_and_who()
    record |= {"rolled_back": {"version": current["version"], "at": record["promoted_at"]}, "history": rest}
    _put(place, "rolled back", current, record)
    return current, record


def keep_report(models: Path, advisor: str, number: int, report_path: Path) -> tuple[Path, str]:
    """Copy a version's report beside the record, named by its content; return (the copy, SHA-256 of the report)."""
    text = report_path.read_text(encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()
    kept = record_path(models, advisor).parent / "reports" / f"v{number}-{digest[:8]}.json"
    page = report_path.with_suffix(".html")
    if not kept.is_file():
        if page.is_file():
            write_text(kept.with_suffix(".html"), page.read_text(encoding="utf-8"))
        write_text(kept, text)
    return kept, digest


# -- the record and its history ---------------------------------------------------------------------------------------


def new_record(models: Path, advisor: str, number: int, decision: dict, history: list[dict]) -> dict:
    """Return the record that puts a version in use.

    ``decision``: report (relative to the record, or None), report_sha256, rule, verdict. ``history``: the records
    before it, newest first, which rollback goes through.
    """
    folder = version_folder(models, advisor, number)
    return {
        "schema_version": SCHEMA_VERSION,
        "advisor": advisor,
        "version": f"v{number}",
        "adapter": f"../{folder.name}",
        "sha256": adapter_hashes(folder),
        "base_fingerprint": training_args(folder).get("base_fingerprint"),
        **decision,
        **_when_and_who(),
        "history": history,
    }


def nothing_in_use(advisor: str) -> dict:
    """Return the record that has the service answer with the base alone."""
    return {"schema_version": SCHEMA_VERSION, "advisor": advisor, **NO_VERSION, **_when_and_who(), "history": []}


def ensure_record(models: Path, advisor: str) -> None:
    """Write down that the base alone is in use where no record says anything: nothing was ever promoted."""
    place = record_path(models, advisor)
    if read_record(place) is None:
        _put(place, "nothing in use", None, nothing_in_use(advisor))


def read_history(models: Path, advisor: str) -> list[dict]:
    """Return the lines of the history, oldest first."""
    path = record_path(models, advisor).with_name(HISTORY)
    return [row for _, row in read_rows(path)] if path.is_file() else []


def _put(place: Path, action: str, before: dict | None, record: dict) -> None:
    """Replace the record and add a line to the history; one that a crash kept out is made up for first."""
    path = place.with_name(HISTORY)
    lines = [_history_line(action, before, record)]
    last = [row for _, row in read_rows(path)][-1:] if path.is_file() else []
    if before and not any(row.get("at") == before["promoted_at"] for row in last):
        lines.insert(0, _history_line("found in use", None, before))
    write_json(place, record)
    # the lines so far are kept as they are; as a new file, a crash leaves no half line behind them
    so_far = path.read_text(encoding="utf-8") if path.is_file() else ""
    so_far += "\n" if so_far and not so_far.endswith("\n") else ""
    with write_atomic(path) as file:
        file.write(so_far)
        jsonl_writer(file).write_all(lines)


def _history_line(action: str, before: dict | None, record: dict) -> dict:
    keys = ("adapter", "sha256", "report", "report_sha256", "rule", "verdict")
    return {
        "at": record["promoted_at"],
        "by": record.get("promoted_by"),
        "action": action,
        "version": record["version"],
        "before": before["version"] if before else None,
        **{key: record.get(key) for key in keys},
    }


def _without_history(record: dict) -> dict:
    return {key: value for key, value in record.items() if key != "history"}


def _when_and_who() -> dict:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
    return {"promoted_at": now, "promoted_by": f"{user}@{socket.gethostname()}"}
