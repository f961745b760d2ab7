"""The router's CUDA kernels against the reference, on a GPU."""

import math

import pytest
import torch

from deepseek_fp4_plugin.kernels import cuda, ops, reference
from deepseek_fp4_plugin.kernels.cuda.routing import scores
from tests.parity.cuda_cases import BF16, DEVICE, ON_A_GPU
from tests.parity.kernel_cases import error

pytestmark = ON_A_GPU


def clear_rows(logits, bias, k: int, n_group: int, topk_group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose groups hang on no near tie, and those of them whose experts do not, either."""
    biased = logits.sigmoid() + bias
    groups = biased.unflatten(-1, (n_group, -1)).topk(2, -1).values.sum(-1).sort(-1, descending=True).values
    more, _ = reference.route(logits, bias, k + 1, n_group, topk_group, True, 1.0)
    best = biased.gather(1, more).sort(-1, descending=True).values
    kept = torch.ones_like(best[:, 0], dtype=torch.bool)
    if topk_group < n_group:
        kept = groups[:, topk_group - 1] - groups[:, topk_group] > 1e-4
    return kept, kept & (best[:, -2] - best[:, -1] > 1e-4)


@pytest.mark.parametrize(
    ("experts", "k", "n_group", "topk_group"), [(256, 8, 8, 4), (32, 4, 8, 4), (16, 4, 1, 1), (500, 7, 5, 2)]
)
def test_router(experts, k, n_group, topk_group):
    shapes = (0, 64), (1, 7168), (4, 9000), (5, 256), (16, 9000), (70, 64), (513, 72), (700, 7168), (64, 7168)
    for tokens, hidden in shapes:
        x, weight = torch.randn(tokens, hidden, device=DEVICE).to(BF16), torch.randn(experts, hidden, device=DEVICE)
        bias, slots = torch.randn(experts, device=DEVICE) * 0.1, torch.randint(-1, 99, (experts,), device=DEVICE)
        for parts, values in ((3, weight), (1, weight.bfloat16().float())):
            values = values / 2 ** round(math.log2(hidden) / 2)
            ours = ops.prepare_router(values, bias, BF16)
            assert ours.backend is cuda and ours.data.parts.shape[0] == parts
            logits = reference.plain_linear(x, values)
            assert error(scores(x, ours.data), logits) <= 1e-5
            biased = logits.sigmoid() + bias
            kept, clear = clear_rows(logits, bias, k, n_group, topk_group)
            assert clear.sum() >= 0.95 * tokens - 1
            for _ in range(2):  # blocks count themselves again
                ids, weights = ops.router(x, ours, k, n_group, topk_group, True, 2.5)
                expected_ids, expected = reference.route(logits, bias, k, n_group, topk_group, True, 2.5)
                assert all(len(set(row)) == k for row in ids.tolist())
                # Of nearly tied experts either one, whose weights differ by their biases.
                chosen, best = (biased.gather(1, own).sort(-1).values for own in (ids, expected_ids))
                assert error(chosen[kept], best[kept]) <= 1e-5
                assert torch.equal(ids.sort(-1).values[clear], expected_ids.sort(-1).values[clear])
                assert error(weights.sort(-1).values[clear], expected.sort(-1).values[clear]) <= 1e-5
            placed = ops.placed_router(x, ours, slots, k, n_group, topk_group, True, 2.5)
            assert all(map(torch.equal, placed, (ids, weights, slots[ids])))
        for normalize in (True, False):
            ids, weights = ops.route(logits, bias, k, n_group, topk_group, normalize, 2.5)
            expected_ids, expected = reference.route(logits, bias, k, n_group, topk_group, normalize, 2.5)
            assert torch.equal(ops.local_ids(ids, slots), slots[ids])
            order, expected_order = ids.sort(-1), expected_ids.sort(-1)
            assert torch.equal(order.values, expected_order.values)
            assert error(weights.gather(1, order.indices), expected.gather(1, expected_order.indices)) <= 1e-5
