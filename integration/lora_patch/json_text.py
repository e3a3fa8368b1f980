"""JSON inside a text: found between prose, mended where that invents nothing, in time linear in the text.

    for value, mends, start, end in find_objects(model_output): ...
    value, mends = parse_json('{"score": 7,}')           # ({"score": 7}, ["trailing_comma"])

Hostile texts end soon: at most `_MAX_TRIES` braces are tried that lead to no sound object, `_MAX_SCANNED` characters
are read again for them, and what is nested deeper than `MAX_DEPTH` is no value.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 40  # levels; an analysis has four
_MAX_TRIES = 1_000
_MAX_SCANNED = 1_000_000
# possessive: a string that never ends must not be tried again from each of its characters
_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+'
_BRACES = re.compile(rf'{_STRING}(?:"|\Z)|\\.|[{{}}]', re.S)  # outside strings, \" opens none: JSON inside JSON
_STRINGS = re.compile(rf'{_STRING}"?|[^"]+', re.S)


def is_number(value: Any) -> bool:
    """Tell whether a JSON value is a finite number; true, false, NaN and integers past 1e300 are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def parse_json(text: str) -> tuple[Any, list[str]]:
    """Return (value, mends) of a text that is one JSON value, after mending what needs no invention.

    Raises ValueError (JSONDecodeError with a position where there is one) for everything else, NaN included.
    """
    try:
        return load_json(text), []
    except json.JSONDecodeError as error:
        original = error
    bare = _without_comments(text)
    forms = [(text, []), (without_trailing_commas(text), ["trailing_comma"])]
    forms += [(without_trailing_commas(bare), ["comments"])] if bare != text else []
    for mended, mends in forms:
        for strict, more in ((True, []), (False, ["raw_control_characters"])):
            try:
                return load_json(mended, strict), [*mends, *more]
            except ValueError:
                continue
    raise original


def load_json(text: str, strict: bool = True) -> Any:
    """Return a JSON value; ValueError, a JSONDecodeError where there is a position, also for NaN and endless nesting.

    ``strict`` False allows control characters in strings.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, strict=strict)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("{") + text.count("[") > MAX_DEPTH and is_too_deep(value):
        raise ValueError("nested too deeply")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def is_too_deep(value: Any, levels: int = MAX_DEPTH) -> bool:
    """Tell whether a parsed value is nested deeper than ``levels``."""
    level = [value]
    for _ in range(levels):
        level = [
            item
            for holder in level
            if isinstance(holder, dict | list)
            for item in (holder.values() if isinstance(holder, dict) else holder)
        ]
        if not level:
            return False
    return True


def strings_in(value: Any) -> Iterator[str]:
    """Yield every string of a parsed value, names of keys included."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            waiting += item


def without_trailing_commas(text: str) -> str:
    """Drop commas before a closing bracket, outside strings."""
    parts = _STRINGS.findall(text)
    return "".join(part if part.startswith('"') else re.sub(r",(?=\s*[}\]])", "", part) for part in parts)


def _without_comments(text: str) -> str:
    """Drop ``// ...`` and ``# ...`` up to the end of the line, outside strings."""
    parts = _STRINGS.findall(text) if "//" in text or "#" in text else [text]
    return "".join(part if part.startswith('"') else re.sub(r"(?://|#)[^\n]*", "", part) for part in parts)


def balanced_end(text: str, start: int, known: dict[int, int | None] | None = None) -> int | None:
    """Return the position after the brace that closes the one at ``start``; None when the text ends before.

    ``known`` keeps what was found for all braces on the way, so that asking for each of them takes one reading.
    """
    known = {} if known is None else known
    if start not in known:
        opened: list[int] = []
        for token in _BRACES.finditer(text, start):
            if token[0] == "{":
                opened.append(token.start())
            elif token[0] == "}":
                known[opened.pop()] = token.end()
                if not opened:
                    break
        known |= dict.fromkeys(opened)
    return known[start]


def find_objects(text: str) -> Iterator[tuple[dict, list[str], int, int]]:
    """Yield (object, mends, start, end) for each JSON object in a text, outermost ones first to last."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    ends: dict[int, int | None] = {}
    at, tries, scanned = text.find("{"), 0, 0
    while at >= 0 and tries < _MAX_TRIES and scanned < _MAX_SCANNED:
        mends: list[str] = []
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            scanned += 0 if at in ends else len(text) - at
            value, end, tries = None, balanced_end(text, at, ends), tries + 1
            if end:
                scanned += end - at
                with contextlib.suppress(ValueError):
                    value, mends = parse_json(text[at:end])
        if isinstance(value, dict) and not is_too_deep(value):
            yield value, mends, at, end
            at = text.find("{", end)
        else:
            tries += isinstance(value, dict)
            at = text.find("{", at + 1)
