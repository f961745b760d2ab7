"""Means with intervals, differences of two runs, and what they allow one to say.

Repeats of one question are not independent, so the question is the unit: a standard error is that of the questions'
mean scores (cluster-robust, Miller, arXiv 2411.00640), intervals are Student's with questions - 1 degrees of freedom.
Two runs on the same questions are compared question by question. Where no question differs the data show no variance;
the interval is then the exact binomial bound on a question that was not seen, never zero.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8

Scores = Mapping[str, Sequence[float]]  # question -> one score a graded part and repeat, 0 to 1


@dataclass(frozen=True)
class Estimate:
    """In points of 100. half: half the width of the interval; low and high keep to what is possible."""

    mean: float
    half: float
    questions: int
    samples: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


@dataclass(frozen=True)
class Comparison:
    """`difference`: this run minus the other, paired.  correlation: of the runs' question means, nan where undefined.

    within: variance of one question's difference over repeats, between: of the questions' true differences; in points
    squared, for one repeat.  gained, lost: questions whose mean rose or fell.
    """

    difference: Estimate
    correlation: float
    within: float
    between: float
    repeats: float
    gained: tuple[str, ...]
    lost: tuple[str, ...]


def estimate(scores: Scores) -> Estimate:
    """Mean over all samples, and its interval over questions. ValueError without a score."""
    values = [np.asarray(v, dtype=float) for v in scores.values() if len(v)]
    if not values:
        raise ValueError("there is no score to average")
    counts = np.array([len(v) for v in values], dtype=float)
    sums = np.array([v.sum() for v in values])
    mean = sums.sum() / counts.sum()
    return _interval(mean, sums - mean * counts, counts)


def _interval(mean: float, residuals: np.ndarray, counts: np.ndarray) -> Estimate:
    """residuals: each question's sum of (score - mean)."""
    questions, total = len(counts), counts.sum()
    half = math.nan
    if questions > 1:
        error = math.sqrt((residuals**2).sum() * questions / (questions - 1)) / total
        half = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, questions - 1))
        if error == 0.0:
            half = unseen(questions)
    else:
        half = 1.0
    return Estimate(100 * float(mean), 100 * half, questions, int(total))


def unseen(questions: int) -> float:
    """The largest share of questions that can behave otherwise when none of `questions` did, at the confidence used."""
    return 1 - (1 - CONFIDENCE) ** (1 / questions)


def compare(ours: Scores, theirs: Scores) -> Comparison:
    """Paired over the questions that both have. ValueError where they have none in common."""
    common = [q for q in ours if q in theirs and len(ours[q]) and len(theirs[q])]
    if not common:
        raise ValueError("the two runs have no question in common")
    left = np.array([np.mean(ours[q]) for q in common])
    right = np.array([np.mean(theirs[q]) for q in common])
    differences = left - right
    mean = differences.mean()
    difference = _interval(mean, differences - mean, np.ones(len(common)))
    within = float(np.mean([_noise(ours[q]) + _noise(theirs[q]) for q in common])) * 1e4
    repeats = float(np.mean([2 / (1 / len(ours[q]) + 1 / len(theirs[q])) for q in common]))
    spread = float(differences.var(ddof=1)) * 1e4 if len(common) > 1 else math.nan
    varies = left.std() > 0 and right.std() > 0
    return Comparison(
        difference,
        float(np.corrcoef(left, right)[0, 1]) if varies else math.nan,
        within,
        max(0.0, spread - within / repeats),
        repeats,
        tuple(q for q, d in zip(common, differences, strict=True) if d > 0),
        tuple(q for q, d in zip(common, differences, strict=True) if d < 0),
    )


def _noise(scores: Sequence[float]) -> float:
    """Variance of one sample of a question. Without repeats it cannot be told from the spread of the questions, which
    then holds both."""
    values = np.asarray(scores, dtype=float)
    return float(values.var(ddof=1)) if len(values) > 1 else 0.0


def detectable(comparison: Comparison) -> float:
    """The smallest true difference, in points, that such a pair of runs would show with the power used."""
    questions = comparison.difference.questions
    return _factor(questions) * math.sqrt((comparison.between + comparison.within / comparison.repeats) / questions)


def repeats_for(comparison: Comparison, points: float) -> int | None:
    """Repeats of each question that would show a true difference of `points`; None where no number would."""
    questions = comparison.difference.questions
    room = (points / _factor(questions)) ** 2 * questions - comparison.between
    if room <= 0:
        return None
    return max(1, math.ceil(comparison.within / room))


def questions_for(comparison: Comparison, points: float) -> int:
    """Questions that would show it with the repeats there are; as many at least as make what none showed so rare."""
    variance = comparison.between + comparison.within / comparison.repeats
    rare = math.log(1 - CONFIDENCE) / math.log(1 - min(points, 99.0) / 100)
    return math.ceil(max(rare, variance * (_factor(comparison.difference.questions) / points) ** 2))


def _points(count: float) -> str:
    return f"{count:g} point{'' if count == 1 else 's'}"


def _factor(questions: int) -> float:
    degrees = max(1, questions - 1)
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees) + stats.t.ppf(POWER, degrees))


def verdict(
    title: str, comparison: Comparison, margin: float, ours: str = "this run", theirs: str = "the other"
) -> str:
    """One sentence: accepted, rejected, or that the data cannot tell and what would."""
    d = comparison.difference
    span = f"{d.mean:+.1f} points, 95 % interval {d.low:+.1f} to {d.high:+.1f}"
    if d.low > -margin:
        what = "is better than" if d.low > 0 else f"is within {_points(margin)} of"
        return f"ACCEPT: {ours} {what} {theirs} on {title} with 95 % confidence ({span})."
    if d.high < -margin:
        return f"REJECT: {ours} is more than {_points(margin)} below {theirs} on {title} with 95 % confidence ({span})."
    smallest = detectable(comparison) or 100 * unseen(d.questions)
    needed = repeats_for(comparison, margin) if comparison.within else None
    if needed is not None and needed > comparison.repeats:
        remedy = f"{needed} repeats of each question would show {margin:g}"
    else:
        never = "no number of repeats would" if comparison.within else "what repeats would bring is not known from one"
        remedy = f"{never}; about {questions_for(comparison, margin):,} questions would show {margin:g}"
    return f"CANNOT TELL: {title} cannot show a difference below {smallest:.1f} points here ({span}); {remedy}."
