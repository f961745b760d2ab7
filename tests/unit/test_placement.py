"""Where routed experts are, when hot ones are held more than once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_fp4_plugin.config import EngineConfig
from deepseek_fp4_plugin.engine.worker_process import _placement
from deepseek_fp4_plugin.parallel.mesh import Mesh
from deepseek_fp4_plugin.parallel.placement import ExpertPlacement, read_load, write_load


def heaviest(held, load) -> float:
    """The most tokens that a rank gets, replicas taking turns."""
    counts = [sum(expert in experts for experts in held) for expert in range(len(load))]
    return max(sum(load[expert] / counts[expert] for expert in experts) for experts in held)


@given(
    st.integers(1, 8).flatmap(
        lambda ranks: st.tuples(
            st.just(ranks), st.lists(st.integers(0, 1000), min_size=ranks, max_size=24), st.integers(0, 12)
        )
    )
)
def test_every_expert_has_a_place_and_none_meets_itself(given):
    ranks, load, more = given
    each = min(-(-len(load) // ranks) + more, len(load))
    ((_, held),) = ExpertPlacement.balanced({3: load}, ranks, each * ranks).layers
    assert [len(experts) for experts in held] == [each] * ranks
    assert all(len(set(experts)) == each for experts in held)
    assert {expert for experts in held for expert in experts} == set(range(len(load)))


def test_hot_experts_are_shared_and_ranks_evened_out():
    load = [1000, 600] + [10] * 14
    plain = Mesh(0, 4, 4)
    runs = [tuple(range(r * 4, r * 4 + 4)) for r in range(plain.ep.count)]
    ((_, dealt),) = ExpertPlacement.balanced({0: load}, 4, 16).layers
    ((_, shared),) = ExpertPlacement.balanced({0: load}, 4, 24).layers
    assert heaviest(runs, load) == 1620
    assert heaviest(dealt, load) <= 1030
    assert heaviest(shared, load) < 1.1 * sum(load) / 4


def test_replicas_take_turns():
    placement = ExpertPlacement(2, ((5, ((0, 1), (0, 2))),))
    slots, counts = placement.replicas(5, 1)
    assert counts.tolist() == [2, 1, 1] and slots.tolist() == [[-1, 0], [-1, -1], [1, -1]]


@pytest.mark.parametrize(("slots", "ranks"), [(18, 4), (12, 4), (68, 4)])
def test_slots_that_cannot_be_dealt_are_refused(slots, ranks):
    with pytest.raises(ValueError, match=f"{slots} expert slots on {ranks} ranks: .* from 16 .* to 64"):
        ExpertPlacement.balanced({0: [1] * 16}, ranks, slots)


def test_a_placement_of_another_model_or_mesh_is_refused():
    placement = ExpertPlacement.balanced({1: [1] * 16}, 4, 16)
    with pytest.raises(ValueError, match="placement for 4 ranks, and moe_expert_parallel_size=2"):
        Mesh(0, 4, 2, placement=placement)
    mesh = Mesh(0, 4, 4, placement=placement)
    with pytest.raises(ValueError, match="no layer 2"):
        mesh.experts(2, 16)
    with pytest.raises(ValueError, match="not one of 32 experts"):
        mesh.experts(1, 32)


def test_load_files_come_back_and_others_are_refused(tmp_path):
    path = tmp_path / "load.json"
    write_load(path, {3: [1, 2], 4: [0, 5]})
    assert read_load(path) == {3: [1, 2], 4: [0, 5]}
    for content in ("", "[]", "{}", '{"3": 1}', '{"a": [1]}', '{"3": [-1]}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="no expert load file"):
            read_load(path)
    with pytest.raises(ValueError, match="no expert load file"):
        read_load(tmp_path / "absent")


def test_the_configuration_says_where_experts_are(tmp_path):
    write_load(tmp_path / "load.json", {1: [9] + [1] * 15})
    balancer = {"load_file": str(tmp_path / "load.json"), "num_slots": 20}
    config = EngineConfig(model="x", tp_size=4, ep_size=4, moe_config={"load_balancer": balancer})
    assert _placement(config) == ExpertPlacement.balanced({1: [9] + [1] * 15}, 4, 20)
    alone = EngineConfig(model="x", tp_size=4, moe_config={"load_balancer": balancer})
    assert _placement(alone) is None
    assert any("load_balancer ignored" in line for line in alone.ignored_settings("cpu"))
    assert EngineConfig(model="x", tp_size=4, moe_tensor_parallel_size=2).expert_ranks == 2
