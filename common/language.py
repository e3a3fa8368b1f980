"""The language of a text, told by py3langid, offline."""

from collections.abc import Iterable

MIN_BYTES = 40  # of UTF-8; shorter texts are too short to tell
LANGUAGE = "en"


def foreign_text(texts: Iterable[str]) -> str | None:
    """Return the beginning of the first text that is not in English, None when all are."""
    from py3langid import classify  # its model takes a tenth of a second to load

    for text in texts:
        if len(text.encode("utf-8", "replace")) >= MIN_BYTES and classify(text)[0] != LANGUAGE:
            return text[:60]
    return None
