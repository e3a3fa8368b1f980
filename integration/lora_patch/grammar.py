"""The grammar of an answer: the schema that a prompt asks for, and llguidance's matcher of it, one a row."""

from collections.abc import Iterable

import numpy as np

from .vlm import Base


def answer_schema(dimensions: Iterable[str]) -> dict:
    """Return the JSON schema of the answer that a prompt with these dimensions asks for, keys in their order."""
    text = {"type": "string", "minLength": 1}
    texts = {"type": "array", "items": text, "minItems": 1, "maxItems": 5}

    def closed(properties: dict) -> dict:
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }

    scored = [
        closed(
            {
                "name": {"const": name},
                "score": {"type": "integer", "minimum": 1, "maximum": 10},
                "comment": text,
                "recommendation": text,
            }
        )
        for name in dimensions
    ]
    listed = {"type": "array", "prefixItems": scored, "items": False, "minItems": len(scored), "maxItems": len(scored)}
    return closed(
        {
            "image_description": text,
            "dimensions": listed,
            "overall_score": {"type": "number", "minimum": 1, "maximum": 10},
            "key_strengths": texts,
            "priority_improvements": texts,
            "technical_notes": text,
        }
    )


class Grammar:
    """The JSON grammar of an answer: llguidance, compiled once and matched by each row on its own."""

    def __init__(self, base: Base, schema: dict):
        # imported here: only a constrained run needs it
        import llguidance
        import llguidance.hf

        self._llguidance = llguidance
        tokenizer = base.processor.tokenizer
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer)
        # without free whitespace: the canonical response is compact
        self._grammar = llguidance.LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
        )

    def matcher(self) -> "Matcher":
        return Matcher(self._llguidance.LLMatcher(self._tokenizer, self._grammar), self._tokenizer.vocab_size)


class Matcher:
    """Where one row stands in the grammar."""

    def __init__(self, matcher, vocabulary: int):
        self._matcher = matcher
        self._bits = np.zeros((1, -(-vocabulary // 32)), dtype=np.int32)

    def allowed(self, vocabulary: int) -> np.ndarray:
        """Return which tokens may follow, bool [vocabulary]; the end of turn alone once the object is closed."""
        import llguidance.numpy

        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits, 0)
        found = np.unpackbits(self._bits.view(np.uint8), bitorder="little").astype(bool)
        return np.pad(found, (0, max(0, vocabulary - len(found))))[:vocabulary]

    def consume(self, token: int) -> None:
        self._matcher.consume_token(token)
        if self._matcher.get_error():
            raise ValueError(f"the grammar refuses token {token}: {self._matcher.get_error()}")

    def forced(self) -> list[int]:
        """Return the tokens that must follow now, whatever the model says: keys, names, punctuation."""
        return self._matcher.compute_ff_tokens()

    def follows(self, tokens: list[int]) -> bool:
        """Go over ``tokens``; False where the grammar does not allow them: it is then of no more use."""
        return self._matcher.try_consume_tokens(tokens) == len(tokens)

    def back(self, count: int) -> None:
        """Take the last ``count`` tokens back."""
        self._matcher.rollback(count)
