"""The language of texts, detected offline by py3langid."""

from integration.lora_patch.analysis import texts_of

MIN_BYTES = 40  # of UTF-8; shorter texts are too short to tell
LANGUAGE = "en"
_LAST_LATIN = "\u024f"  # of Latin Extended-B


def foreign_text(analysis: dict) -> str | None:
    """Return the beginning of the first text of an analysis that is not in English, None when all are."""
    from py3langid import classify  # its model takes a tenth of a second to load

    for text in texts_of(analysis):
        if len(text.encode("utf-8", "replace")) >= MIN_BYTES and classify(text)[0] != LANGUAGE:
            return text[:60]
    return None


def is_latin(text: str) -> bool:
    """Tell whether a text that no analysis can be read from is at least in Latin letters, nine tenths of them."""
    letters = [letter for letter in text if letter.isalpha()]
    return sum(letter > _LAST_LATIN for letter in letters) <= 0.1 * len(letters)
