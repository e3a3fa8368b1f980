"""Expected scores: the mean of a score under the model's probabilities, along the answer that it gave.

A greedy score is the likeliest digit alone; the expected one also says how near the next digits came (Liu et al. 2023,
G-Eval, https://arxiv.org/abs/2303.16634). Both come from one generation.
"""

import numpy as np

from common.evaluation.scoring import score_spans

DIGITS = "0123456789"


def expected_scores(text: str, pieces: list[str], log_probabilities: np.ndarray) -> dict[str, float]:
    """Return {dimension or "overall_score": points} of the scores in an answer.

    ``pieces``: the text of each token of the answer. ``log_probabilities``: float [tokens, 10], of the digits 0 to 9
    where each token was chosen (natural logarithms, over the whole vocabulary). A score is left out where its digits
    are not tokens of their own.

    The first digit's probabilities are taken among 1 to 9. A 1 that the answer did not choose counts as 10.
    """
    letters = [(at, letter) for at, piece in enumerate(pieces) for letter in piece if letter in DIGITS]
    places = [at for at, letter in enumerate(text) if letter in DIGITS]
    if [letter for _, letter in letters] != [text[at] for at in places]:
        return {}
    token_at = {place: at for place, (at, _) in zip(places, letters, strict=True) if pieces[at] in DIGITS}
    chances = np.exp(log_probabilities.astype(np.float64))
    found = {}
    for name, (start, end) in score_spans(text).items():
        if not token_at.keys() >= {at for at in range(start, end) if text[at] in DIGITS}:
            continue
        whole, _, decimals = text[start:end].partition(".")
        first = token_at[start]
        among = chances[first, 1:] / max(chances[first, 1:].sum(), 1e-30)
        values = np.arange(1.0, 10.0)
        ten = 1.0
        if whole[0] == "1":  # the model has said whether a 0 follows
            ten = chances[first + 1, 0] if first + 1 < len(chances) else 0.0
        values[0] = 10 * ten + 1 * (1 - ten)
        score = float((among * values).sum())
        if decimals:
            tenths = chances[token_at[start + len(whole) + 1]]
            score += float((tenths * np.arange(10)).sum() / max(tenths.sum(), 1e-30)) / 10
        found[name] = score
    return found
