"""The grammar of an answer: the schema that a prompt asks for, and llguidance's matcher of it, one a row."""

import itertools
import math

import numpy as np

from .specification import DIMENSION_SPELLINGS, PromptSpecification
from .vlm import Base


def answer_schema(specification: PromptSpecification) -> dict:
    """Return the JSON schema of the answer that a prompt asks for: its keys in their order, without optional ones."""
    low, high = specification.score_range
    number = {"type": "number", "minimum": low, "maximum": high}
    whole = range(math.ceil(low), int(high) + 1)
    text = {"type": "string", "minLength": 1}
    kinds = {
        "text": text,
        "texts": {"type": "array", "items": text, "minItems": 1, "maxItems": 5},
        "whole": {**number, "type": "integer"},
        **dict.fromkeys(("number", "mean", "decimal"), number),  # no JSON schema can demand 7.0 instead of 7
        "quoted": {"enum": [str(score) for score in whole]},
        "of_ten": {"enum": [f"{score}/{high:g}" for score in whole]},
        "any": {},
    }

    def closed(properties: dict) -> dict:
        return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}

    scored = [
        closed(
            {
                field.name: {"const": name} if field.name in DIMENSION_SPELLINGS["name"] else kinds[field.kind]
                for field in specification.dimension_fields
                if field.required
            }
        )
        for name in specification.dimensions
    ]
    count = len(scored)
    kinds["list"] = {"type": "array", "prefixItems": scored, "items": False, "minItems": count, "maxItems": count}
    kinds["object"] = closed(dict(zip(specification.dimensions, scored, strict=True)))
    return closed({field.name: kinds[field.kind] for field in specification.fields if field.required})


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
        return Matcher(self._llguidance.LLMatcher(self._tokenizer, self._grammar), self._tokenizer)


class Matcher:
    """Where one row stands in the grammar."""

    def __init__(self, matcher, tokenizer):
        self._matcher, self._tokenizer = matcher, tokenizer

    def allowed(self, vocabulary: int) -> np.ndarray:
        """Return which tokens may follow, a bit each, from the lowest of each word up, uint32 [vocabulary / 32, rounded
        up]; the end of turn alone once the object is closed."""
        import llguidance.numpy

        known, wanted = -(-self._tokenizer.vocab_size // 32), -(-vocabulary // 32)
        bits = np.zeros((1, max(known, wanted)), dtype=np.int32)
        llguidance.numpy.fill_next_token_bitmask(self._matcher, bits[:, :known], 0)
        return bits[0, :wanted].view(np.uint32)

    def legal(self, tokens: list[int]) -> int:
        """Return how many of ``tokens`` may follow, one after the other.

        `allowed` may leave out some of them: of text that must follow it has the usual tokens alone.
        """
        size = self._tokenizer.vocab_size  # a model has some more, over which the matcher breaks
        return self._matcher.validate_tokens(list(itertools.takewhile(lambda token: token < size, tokens)))

    def consume(self, token: int) -> None:
        self._matcher.consume_token(token)
        if self._matcher.get_error():
            raise ValueError(f"the grammar refuses token {token}: {self._matcher.get_error()}")

    def forced(self) -> list[int]:
        """Return the tokens of the text that must follow now, whatever the model says: keys, names, punctuation.

        As the tokenizer cuts that text. llguidance's fast-forward tokens leave out its last token, which what comes
        after could in theory make a longer one; for a guess it is as good as the others.
        """
        text = self._matcher.compute_ff_bytes()
        return self._tokenizer.tokenize_bytes(text) if text else []

    def follows(self, tokens: list[int]) -> bool:
        """Go over ``tokens``; False where the grammar does not allow them: it is then of no more use."""
        return self._matcher.try_consume_tokens(tokens) == len(tokens)

    def back(self, count: int) -> None:
        """Take the last ``count`` tokens back."""
        self._matcher.rollback(count)
