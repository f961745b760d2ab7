"""Who holds what and who exchanges with whom, and the collectives themselves."""

import pytest
import torch

from deepseek_fp4_plugin.parallel import collectives
from deepseek_fp4_plugin.parallel.collectives import ALONE, Counting
from deepseek_fp4_plugin.parallel.mesh import WHOLE, Mesh, Shard
from tests.ranks import in_threads


def test_one_rank_has_no_group_and_costs_nothing():
    mesh, x = Mesh(), torch.randn(3, 4)
    assert mesh.tp == mesh.dp == mesh.ep == mesh.moe_tp == WHOLE
    for group in (mesh.tp_group, mesh.dp_group, mesh.world):
        assert group is ALONE
        assert group.all_reduce(x) is x and group.all_gather(x) is x
        assert group.reduce_scatter(x) is x and group.broadcast(x) is x


def test_tp8_ep2_is_tensorrt_llms():
    """Each expert-parallel rank holds half of the experts, each tensor-parallel one a quarter of these."""
    ranks = [Mesh(rank, 8, moe_expert_parallel_size=2) for rank in range(8)]
    assert [m.ep for m in ranks] == [Shard(rank % 2, 2) for rank in range(8)]
    assert [m.moe_tp for m in ranks] == [Shard(rank // 2, 4) for rank in range(8)]
    assert {m.ep_ranks for m in ranks} == {(0, 1), (2, 3), (4, 5), (6, 7)}
    assert {m.moe_tp_ranks for m in ranks} == {(0, 2, 4, 6), (1, 3, 5, 7)}
    assert [m.tp for m in ranks] == [Shard(rank, 8) for rank in range(8)]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((4, None, None), (1, 4)), ((4, 2, None), (2, 2)), ((4, None, 2), (2, 2)), ((4, None, 4), (1, 4)),
     ((4, 4, 1), (4, 1))],
)  # fmt: skip
def test_the_size_left_out_follows(sizes, expected):
    mesh = Mesh(0, *sizes)
    assert (mesh.ep.count, mesh.moe_tp.count) == expected


def test_attention_data_parallelism_cuts_experts_only():
    for rank in range(4):
        mesh = Mesh(rank, 4, moe_expert_parallel_size=2, enable_attention_dp=True)
        assert mesh.tp == WHOLE and mesh.dp == Shard(rank, 4)
        assert (mesh.ep, mesh.moe_tp) == (Shard(rank % 2, 2), Shard(rank // 2, 2))
        assert mesh.tp_group is ALONE and mesh.dp_group.size == 4


@pytest.mark.parametrize(
    ("rank", "sizes", "message"),
    [
        (0, (8, 3), "moe_expert_parallel_size=3 does not divide tensor_parallel_size=8"),
        (0, (8, 2, 2), "moe_expert_parallel_size=2 times moe_tensor_parallel_size=2 is not tensor_parallel_size=8"),
        (4, (4,), "rank 4 is outside the 4 ranks"),
        (0, (0,), "tensor_parallel_size=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(rank, sizes, message):
    with pytest.raises(ValueError, match=message):
        Mesh(rank, *sizes)


def test_a_group_of_other_ranks_is_refused():
    with pytest.raises(ValueError, match="rank 0 of 2 got the group of rank 0 of 1"):
        Mesh(0, 2, group=ALONE)


def test_ranks_that_only_load_refuse_to_exchange():
    with pytest.raises(RuntimeError, match="rank 1 of 2 has no process group"):
        Mesh(1, 2).tp_group.all_reduce(torch.ones(1))


SIZES = [(2, 2, 2), (0, 3, 1), (5, 0, 0), (0, 0, 0)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_rows_are_gathered_and_scattered_by_their_sizes(sizes):
    given = torch.randn(3, sum(sizes), 4)

    def run(group):
        own = given[0].split(sizes)[group.rank]
        return group.all_gather(own, sizes), group.reduce_scatter(given[group.rank], sizes)

    total = (given[0] + given[1]) + given[2]
    for rank, (gathered, scattered) in enumerate(in_threads(3, run)):
        assert torch.equal(gathered, given[0])
        assert torch.equal(scattered, total.split(sizes)[rank])


def test_equal_sizes_may_be_left_out():
    given = torch.randn(2, 4, 3)
    out = in_threads(2, lambda g: (g.all_gather(given[g.rank]), g.reduce_scatter(given[g.rank])))
    assert all(torch.equal(gathered, given.flatten(0, 1)) for gathered, _ in out)
    assert torch.equal(torch.cat([scattered for _, scattered in out]), given[0] + given[1])


def test_broadcast_brings_one_ranks_values():
    given = torch.randint(0, 9, (3, 5))
    assert all(torch.equal(y, given[2]) for y in in_threads(3, lambda g: g.broadcast(given[g.rank], source=2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(0, 8), (1, 7), (33, 129)])
def test_sums_are_the_same_bits_on_every_rank_and_in_any_batch(monkeypatch, dtype, shape):
    """Added in FP32 in rank order and rounded once, whether a tensor goes around whole or in parts."""
    given = torch.randn(4, *shape).to(dtype)
    expected = given[0].float()
    for part in given[1:]:
        expected = expected + part.float()
    for limit in (0, 1 << 30):
        monkeypatch.setattr(collectives, "_ONE_EXCHANGE", limit)
        for y in in_threads(4, lambda g: g.all_reduce(given[g.rank])):
            assert y.dtype is dtype and torch.equal(y, expected.to(dtype))
        if shape[0]:
            for y in in_threads(4, lambda g: g.all_reduce(given[g.rank][:1])):  # the first row in less company
                assert torch.equal(y, expected.to(dtype)[:1])


def test_payloads_are_counted():
    def run(group):
        counted = Counting(group)
        counted.all_reduce(torch.ones(3, 2))
        counted.all_gather(torch.ones(group.rank, 2, dtype=torch.bfloat16), (0, 1))
        counted.reduce_scatter(torch.ones(2, 2), (2, 0))
        return counted.bytes, counted.calls

    for found, calls in in_threads(2, run):
        assert found == {"all_reduce": 24, "all_gather": 4, "reduce_scatter": 16}
        assert calls == {"all_reduce": 1, "all_gather": 1, "reduce_scatter": 1}
