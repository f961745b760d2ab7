"""Two hundred stops of a quantization: kills, power losses and full disks at every kind of moment."""

import random
from collections import Counter

import pytest

from tests import stops
from tests.stops import KINDS, Stop, small  # noqa: F401 (fixture)

pytestmark = pytest.mark.proof
COUNT = 200


def test_a_stopped_run_ends_with_the_same_bytes(small, tmp_path):  # noqa: F811
    """Every fsync, rename, creation and removal once, by each kind of stop in turns; the rest in and before writes."""
    done, expected = stops.steps(small, tmp_path / "first")
    others = [step for step, what in enumerate(done) if not what.startswith("write")]
    writes = [step for step, what in enumerate(done) if what.startswith("write")]
    chosen = others + random.Random(1).sample(writes, COUNT - len(others))
    planned = [Stop(step, KINDS[turn % len(KINDS)]) for turn, step in enumerate(chosen)]
    ended = stops.prove(small, tmp_path, planned, expected)
    print(f"\n{len(done)} steps, {len(planned)} stops, all ended with the same {len(expected)} files")
    for (kind, how), count in sorted(ended.items()):
        print(f"  {kind:10}  next run {how:11}  {count}")
    assert sum(ended.values()) == COUNT
    assert all(count > 50 for count in Counter(stop.kind for stop in planned).values())
