"""What a set of analyses says about itself: signs that a model answered without looking, in sentences."""

from collections import Counter

from common.data.candidates import Candidate


def copied_sentence(candidates: list[Candidate]) -> dict:
    """Return {"share", "count", "of", "text"}: how many analyses carry the scores of the example in their prompt."""
    copied = sum("copied_scores" in candidate.verdicts for candidate in candidates)
    share = copied / len(candidates) if candidates else 0.0
    if copied:
        text = (
            f"Copied scores: {copied:,} of {len(candidates):,} analyses ({share:.0%}) carry exactly the scores of the "
            "example in their own prompt; they teach the example, not the photograph."
        )
    else:
        text = f"Copied scores: none of {len(candidates):,} analyses carries the scores of the example in its prompt."
    return {"share": round(share, 4), "count": copied, "of": len(candidates), "text": text}


def findings_of(candidates: list[Candidate], dimensions: tuple[str, ...]) -> list[str]:
    """Return further signs of bad data, a sentence each; none for data without them."""
    total = len(candidates)
    findings = []

    def say(count: int, sentence: str) -> None:
        if count:
            findings.append(f"{count:,} of {total:,} analyses ({count / total:.0%}) {sentence}")

    say(sum(c.near_copy for c in candidates), "differ from that example in a single score")
    say(sum(c.overall_copied for c in candidates), "have the example's overall score over other dimension scores")
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
    say(
        sum(c.overall_changed for c in candidates),
        "got another overall score by that: the mean of the dimensions that are left",
    )
    return findings


def _constant(candidates: list[Candidate]) -> list[float | None]:
    """Return for each dimension the score that all analyses give it; None where they differ."""
    if len({len(c.scores) for c in candidates}) != 1:
        return []
    return [
        column[0] if len(set(column)) == 1 else None for column in zip(*(c.scores for c in candidates), strict=True)
    ]
