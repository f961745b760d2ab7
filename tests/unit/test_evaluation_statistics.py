"""Intervals cover what they say, equal an independent package's, and ignoring repeats is shown to fail."""

import math

import numpy as np
import pytest
import statsmodels.api as sm

from deepseek_fp4_plugin.evaluation import statistics as st

QUESTIONS, REPEATS, SIMULATIONS = 60, 5, 1000


def simulated(rng: np.random.Generator, shift: float) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Two runs over questions of very different difficulty; the first is better by `shift` on every one."""
    p = rng.uniform(0.05, 0.95 - shift, QUESTIONS)
    ours = rng.random((QUESTIONS, REPEATS)) < (p + shift)[:, None]
    theirs = rng.random((QUESTIONS, REPEATS)) < p[:, None]
    return _scores(ours), _scores(theirs)


def _scores(values: np.ndarray) -> dict[str, list[float]]:
    return {f"q{i}": row.astype(float).tolist() for i, row in enumerate(values)}


def test_coverage_of_a_known_difference():
    rng, shift = np.random.default_rng(0), 0.04
    pairs = [st.compare(*simulated(rng, shift)).difference for _ in range(SIMULATIONS)]
    covered = np.mean([d.low <= 100 * shift <= d.high for d in pairs])
    assert abs(covered - 0.95) < 3 * math.sqrt(0.95 * 0.05 / SIMULATIONS)


def test_coverage_of_a_mean_and_failure_without_clusters():
    rng, truth = np.random.default_rng(1), 0.5
    clustered, ignored = [], []
    for _ in range(SIMULATIONS):
        scores = _scores(rng.random((QUESTIONS, REPEATS)) < rng.uniform(0.05, 0.95, QUESTIONS)[:, None])
        one = st.estimate(scores)
        clustered.append(one.low <= 100 * truth <= one.high)
        alone = st.estimate({f"{q}/{i}": [v] for q, values in scores.items() for i, v in enumerate(values)})
        ignored.append(alone.low <= 100 * truth <= alone.high)
    assert abs(np.mean(clustered) - 0.95) < 3 * math.sqrt(0.95 * 0.05 / SIMULATIONS)
    assert np.mean(ignored) < 0.9  # repeats taken for questions promise more than they hold


@pytest.mark.parametrize("uneven", [False, True])
def test_interval_equals_statsmodels(uneven):
    rng = np.random.default_rng(2)
    scores = {f"q{i}": rng.random(1 + (i % 4 if uneven else 2)).round().tolist() for i in range(30)}
    values = np.concatenate([np.asarray(v) for v in scores.values()])
    groups = np.repeat(np.arange(30), [len(v) for v in scores.values()])
    fit = sm.OLS(values, np.ones(len(values))).fit(
        cov_type="cluster", cov_kwds={"groups": groups, "use_correction": True, "df_correction": True}, use_t=True
    )
    ours, (low, high) = st.estimate(scores), fit.conf_int()[0]
    assert ours.mean == pytest.approx(100 * fit.params[0], abs=1e-9)
    assert (ours.low, ours.high) == pytest.approx((100 * low, 100 * high), abs=1e-9)


def test_paired_interval_equals_statsmodels():
    ours, theirs = simulated(np.random.default_rng(3), 0.1)
    differences = [np.mean(ours[q]) - np.mean(theirs[q]) for q in ours]
    low, high = sm.stats.DescrStatsW(differences).tconfint_mean()
    d = st.compare(ours, theirs).difference
    assert (d.low, d.high) == pytest.approx((100 * low, 100 * high), abs=1e-9)


def test_pairing_sees_what_two_intervals_do_not():
    """Questions of every difficulty, the second run wrong on a few more: the pairs agree on all the others."""
    ours = {f"q{i}": [float(i % 2)] for i in range(400)}
    theirs = {q: [0.0] if i < 24 and i % 2 else v for i, (q, v) in enumerate(ours.items())}
    one, two, pair = st.estimate(ours), st.estimate(theirs), st.compare(ours, theirs)
    assert one.low < two.high  # alone they overlap
    assert pair.difference.low > 0 and len(pair.gained) == 12 and not pair.lost


def test_no_difference_seen_is_not_certainty():
    same = {f"q{i}": [1.0] for i in range(30)}
    d = st.compare(same, same).difference
    assert d.mean == 0 and d.half == pytest.approx(100 * (1 - 0.05 ** (1 / 30)))
    assert "CANNOT TELL" in st.verdict("AIME", st.compare(same, same), 1.0)
    many = {f"q{i}": [1.0] for i in range(400)}
    assert st.verdict("MMLU", st.compare(many, many), 1.0).startswith("ACCEPT")


def test_verdicts():
    rng = np.random.default_rng(4)
    base = {f"q{i}": [float(v)] for i, v in enumerate(rng.random(5000) < 0.7)}
    worse = {q: [0.0] if i % 12 == 0 else v for i, (q, v) in enumerate(base.items())}
    assert st.verdict("T", st.compare(worse, base), 1.0).startswith("REJECT")
    assert st.verdict("T", st.compare(base, worse), 1.0).startswith("ACCEPT: this run is better")
    small = {q: base[q] for q in list(base)[:30]}
    assert st.verdict("T", st.compare({q: worse[q] for q in small}, small), 1.0).startswith("CANNOT TELL")


def test_repeats_that_are_said_to_suffice_do():
    """Power: with the number of repeats named, a difference of that size is found four times of five."""
    rng, points = np.random.default_rng(5), 5.0
    p = rng.uniform(0.3, 0.6, 200)

    def pair(repeats: int, shift: float) -> st.Comparison:
        sides = [rng.random((200, repeats)) < (p + s)[:, None] for s in (shift, 0.0)]
        return st.compare(_scores(sides[0]), _scores(sides[1]))

    pilots = [st.repeats_for(pair(4, 0.0), points) for _ in range(20)]
    needed = int(np.median([n for n in pilots if n is not None]))
    found = np.mean([pair(needed, points / 100).difference.low > 0 for _ in range(300)])
    assert 0.7 < found < 0.92


def test_nothing_to_say():
    with pytest.raises(ValueError, match="no score"):
        st.estimate({})
    with pytest.raises(ValueError, match="in common"):
        st.compare({"a": [1.0]}, {"b": [1.0]})
