"""What a set of analyses says about itself: signs that a model answered without looking, in sentences."""

from collections import Counter

from common.data.candidates import Candidate

_COPIES = {
    "reject": "they are left out",
    "mask": "their scores stay out of the loss",
    "warn": "they are trained on as they are",
    "off": "they are trained on as they are",
}


def left_to_learn(candidates: list[Candidate], groups: list[int], level: str) -> dict:
    """Return {"comments", "scores": photographs to learn them from, "copied", "near", "of": analyses, "text"}.

    ``groups`` is the photograph group of each candidate, ``level`` that of the gate copied_scores. Scores that a model
    copied from its prompt are nothing to learn from.
    """
    chosen = [(group, candidate) for group, candidate in zip(groups, candidates, strict=True) if not candidate.reason]
    comments, scores = len({group for group, _ in chosen}), len({group for group, c in chosen if not c.copied})
    copied, near = (sum(c.copied in kinds for c in candidates) for kinds in (("exact", "near"), ("near",)))
    photographs = "photograph" if comments == 1 else "photographs"
    text = f"Left to learn: comments of {comments:,} {photographs}, scores of {scores:,}."
    if copied:
        share, but = f"{copied / len(candidates):.0%}", f", {near:,} of them but for one" if near else ""
        text += (
            f" {copied:,} of {len(candidates):,} analyses ({share}) carry the scores of the example in their own "
            f"prompt{but}: {_COPIES[level]}."
        )
    return {"comments": comments, "scores": scores, "copied": copied, "near": near, "of": len(candidates), "text": text}


def findings_of(candidates: list[Candidate], dimensions: tuple[str, ...]) -> list[str]:
    """Return further signs of bad data, a sentence each; none for data without them."""
    total = len(candidates)
    findings = []

    def say(count: int, sentence: str) -> None:
        if count:
            findings.append(f"{count:,} of {total:,} analyses ({count / total:.0%}) {sentence}")

    vectors = Counter(c.scores for c in candidates)
    vector, count = vectors.most_common(1)[0]
    if total >= 5 and count > total / 2:
        say(
            count,
            f"have the same scores, {', '.join(f'{s:g}' for s in vector)}; {len(vectors):,} different sets in all",
        )
    constant = [
        f"{name} {score:g}"
        for name, score in zip(dimensions, _constant(candidates), strict=False)
        if score is not None and total >= 5
    ]
    if constant:
        findings.append(f"every analysis gives the same score to {', '.join(constant)}")
    say(
        sum(c.projected for c in candidates),
        "answer more dimensions than today's prompt asks for, and were cut to those",
    )
    say(sum(c.overall_changed for c in candidates), "got another overall score: the mean of their dimensions")
    return findings


def _constant(candidates: list[Candidate]) -> list[float | None]:
    """Return for each dimension the score that all analyses give it; None where they differ."""
    if len({len(c.scores) for c in candidates}) != 1:
        return []
    return [
        column[0] if len(set(column)) == 1 else None for column in zip(*(c.scores for c in candidates), strict=True)
    ]
