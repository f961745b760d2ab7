"""The CUDA kernels against the reference, on a GPU.

Tolerances as in kernel_cases.py: products are exact and sums FP32 on both sides, so results differ by one BF16 step
of the largest where a rounding tips; two are allowed, and twice as many where hidden values are rounded in between.
"""

import itertools

import pytest
import torch

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import cpu, cuda, ops, reference
from deepseek_fp4_plugin.kernels.cuda import cuts, dense, experts_wgmma, launcher, matvec, wgmma
from deepseek_fp4_plugin.kernels.cuda import experts as cuda_experts
from deepseek_fp4_plugin.kernels.recording import beside
from deepseek_fp4_plugin.kernels.weights import WeightTensors
from deepseek_fp4_plugin.numerics import e2m1
from tests.parity.cuda_cases import BF16, DEVICE, ON_A_GPU, both, poisoned
from tests.parity.kernel_cases import TWO_STEPS, error, random_part

pytestmark = ON_A_GPU


@pytest.mark.parametrize("activations", ["bf16", "fp4"])
@pytest.mark.parametrize(
    ("out", "width"), [(1, 16), (7, 48), (64, 128), (130, 1040), (200, 4112), (512, 7168), (7168, 256), (768, 18432)]
)
def test_linear(out, width, activations):
    for parts in ([out], [out, out], [out, out + 3]):
        ours, law = both([random_part(WeightFormat.NVFP4, n, width) for n in parts], activations)
        for rows in (0, 1, 2, 7, 8, 9, 16, 31, 33, 64, 65, 130, 200, 300, 600):
            x = torch.randn(rows, width, device=DEVICE).to(BF16)
            assert error(ops.linear(x, ours), ops.linear(x, law)) <= TWO_STEPS, (parts, rows)


@pytest.mark.parametrize("cut", cuts.every(), ids=lambda cut: "-".join(map(str, cut)))
def test_every_cut_of_wgmma(cut):
    """Whatever shape it was measured for; NaN beside the rows, and where the result will be."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma is Hopper's alone")
    for out, width in ((1, 16), (7, 48), (130, 1040), (264, 4112)):
        for parts in ([out], [out, out]):
            (part, *_), count = [random_part(WeightFormat.NVFP4, n, width) for n in parts], len(parts)
            ours, law = both([part] * count)
            for rows in (1, 7, 65, 200):
                x = poisoned(rows, width)
                y = torch.full((rows, out * count), float("nan"), dtype=BF16, device=DEVICE)
                fits = cut._replace(cluster=min(cut.cluster, ours.data.slabs))
                wgmma.launch(x, ours.data, 0, y, out * count, False, fits)
                expected = ops.linear(x, law)
                assert error(y, expected) <= TWO_STEPS, (out, width, rows)
                if count == 2:
                    h = torch.full((rows, out), float("nan"), dtype=BF16, device=DEVICE)
                    wgmma.launch(x, ours.data, 0, h, out * count, True, fits)
                    gate, up = expected.chunk(2, -1)
                    assert error(h, torch.nn.functional.silu(gate) * up) <= 2 * TWO_STEPS, (out, width, rows)


def test_nothing_is_compiled_behind_what_is_built_ahead():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma is Hopper's alone")
    gate_up, down = (
        both([random_part(WeightFormat.NVFP4, *shape)] * n)[0] for n, shape in ((2, (256, 7168)), (1, (7168, 256)))
    )
    for rows in (1, 8, 9, 700):  # other kernels
        ops.gated_mlp(torch.zeros(rows, 7168, device=DEVICE, dtype=BF16), gate_up, down)
    ops.build_ahead([gate_up, down], 640)
    before = launcher.kernel.cache_info().misses
    for rows in range(16, 641, 16):
        ops.gated_mlp(torch.zeros(rows, 7168, device=DEVICE, dtype=BF16), gate_up, down)
    assert launcher.kernel.cache_info().misses == before


@pytest.mark.parametrize("kind", [(144, 1, 8, 4), (128, 1, 12, 4), (152, 2, 8, 3)], ids=str)
def test_slabs_shared_evenly(kind):
    """Parts of sums meet in memory: the same bits each time, in a graph too, whoever comes first."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma is Hopper's alone")
    cut = cuts.Cut(*kind, cuts.EVEN)
    for parts, width in ((1, 16384), (2, 7168), (2, 2048)):
        part = random_part(WeightFormat.NVFP4, 4608 // parts, width)
        ours, law = both([part] * parts)
        for rows in (129, 700, 2000):  # parts of one product, of some, and products of a block's own before
            x = poisoned(rows, width)
            results = [torch.full((rows, 4608), float("nan"), dtype=BF16, device=DEVICE) for _ in range(10)]
            for y in results[1:]:
                wgmma.launch(x, ours.data, 0, y, 4608, False, cut)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                wgmma.launch(x, ours.data, 0, results[0], 4608, False, cut)
            graph.replay()
            expected = ops.linear(x, law)
            assert error(results[0], expected) <= TWO_STEPS, (width, rows)
            assert all(torch.equal(y, results[0]) for y in results)
            if parts == 2:
                h = torch.full((rows, 2304), float("nan"), dtype=BF16, device=DEVICE)
                wgmma.launch(x, ours.data, 0, h, 4608, True, cut)
                gate, up = expected.chunk(2, -1)
                assert error(h, torch.nn.functional.silu(gate) * up) <= 2 * TWO_STEPS, (width, rows)


@pytest.mark.parametrize(("groups", "slabs"), [(32, 56), (256, 56), (288, 56), (2304, 56), (448, 144)])
def test_every_cut_of_few_rows(groups, slabs):
    """Whatever shape it is for; NaN beside the rows, and where the result will be."""
    cut = matvec.choose(groups, slabs, 1)
    for out, width in ((1, 16), (7, 48), (130, 1040), (264, 4112), (5000, 2048)):
        for parts in ([out], [out, out]):
            (part, *_), count = [random_part(WeightFormat.NVFP4, n, width) for n in parts], len(parts)
            ours, law = both([part] * count)
            for rows in (1, 3, 8):
                x = poisoned(rows, width)
                y = torch.full((rows, out * count), float("nan"), dtype=BF16, device=DEVICE)
                matvec.launch(x, ours.data, 0, y, out * count, False, cut)
                expected = ops.linear(x, law)
                assert error(y, expected) <= TWO_STEPS, (out, width, rows)
                if count == 2:
                    h = torch.full((rows, out), float("nan"), dtype=BF16, device=DEVICE)
                    matvec.launch(x, ours.data, 0, h, out * count, True, cut)
                    gate, up = expected.chunk(2, -1)
                    assert error(h, torch.nn.functional.silu(gate) * up) <= 2 * TWO_STEPS, (out, width, rows)


@pytest.mark.parametrize("weight_format", [WeightFormat.PLAIN, WeightFormat.FP8_BLOCK], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("out", "width"),
    [(1, 16), (7, 48), (16, 64), (130, 1040), (200, 4112), (576, 7168), (5000, 256), (1200, 7168), (300, 30)],
)
def test_dense_linear(weight_format, out, width):
    """By the kernel where it serves the rows, which the shapes and rows here are on both sides of."""
    for parts in ([out], [out, out + 3]):
        ours, law = both([random_part(weight_format, n, width) for n in parts])
        for rows in (0, 1, 2, 7, 8, 9, 16, 17, 200):
            x = poisoned(rows, width)
            kernel = dense.served(rows, sum(parts), width, ours.data.fp8 is not None)
            assert kernel == (0 < rows <= (16 if sum(parts) <= 4096 else 8) and width != 30)
            # Decoded FP8 values are rounded to BF16 once more.
            exact = weight_format is WeightFormat.PLAIN or (kernel and ours.data.fp8)
            bound = TWO_STEPS if exact else 4 * TWO_STEPS
            assert error(ops.linear(x, ours), ops.linear(x, law)) <= bound, (parts, rows)


def test_dense_cuts():
    """Every way to cut a product, on FP8 blocks of two sizes with scales over 40 octaves, and every E4M3 number."""
    for out, columns in ((40, 128), (300, 64)):
        width = 1040
        codes = (torch.arange(out * width, device=DEVICE) % 256).to(torch.uint8).view(out, width)
        codes[(codes & 0x7F) == 0x7F] = 0
        scale = 2.0 ** torch.randint(-20, 20, (-(-out // 128), -(-width // columns)), device=DEVICE).float()
        part = WeightTensors(WeightFormat.FP8_BLOCK, codes.view(torch.float8_e4m3fn), scale, fp8_block=(128, columns))
        law = ops.prepare([part], DEVICE, BF16, backend="reference")
        weight = dense.Fp8Blocks(part.weight, scale, 128, columns)
        plain = WeightTensors(WeightFormat.PLAIN, torch.randn(out, width, device=DEVICE).to(BF16))
        plain_law = ops.prepare([plain], DEVICE, BF16, backend="reference")
        for groups, warps, cluster, turns in ((1, 2, 1, 1), (2, 4, 1, 2), (1, 16, 1, 3), (1, 8, 4, 1), (2, 8, 2, 1)):
            for rows, ahead, pace in ((1, 4, 0), (1, 4, 1), (3, 1, 2), (8, 2, 0), (9, 1, 0), (16, 2, 1)):
                sets = -(-out // (16 * groups))
                cut = dense.Cut(1 if rows <= 8 else 2, groups, warps, 4, cluster, -(-sets // turns), ahead, pace)
                x = poisoned(rows, width)
                for data, expected in ((weight, ops.linear(x, law)), (plain.weight, ops.linear(x, plain_law))):
                    y = torch.full((rows, out), float("nan"), dtype=BF16, device=DEVICE)
                    dense.launch(x, data, y, cut)
                    assert error(y, expected) <= TWO_STEPS, (out, cut)


def test_fp8_nan_is_not_lost():
    part = random_part(WeightFormat.FP8_BLOCK, 1200, 7168)
    part.weight.view(torch.uint8)[3, 5] = 0x7F
    ours, law = both([part])
    x = torch.randn(2, 7168, device=DEVICE).to(BF16)
    assert torch.equal(ops.linear(x, ours).isnan(), ops.linear(x, law).isnan())
    assert ops.linear(x, ours)[:, 3].isnan().all()


def test_poison_and_strides():
    """Rows cut out of wider ones at any address, NaN around them; results and scales over 30 octaves."""
    for width in (48, 400, 4112):
        for scale_2 in (2.0**-20, 1.0, 2.0**10):
            ours, law = both([random_part(WeightFormat.NVFP4, 70, width, scale_2=scale_2)])
            for left in (0, 1, 8):
                wide = torch.full((9, left + width + 5), float("nan"), dtype=BF16, device=DEVICE)
                wide[:, left : left + width] = torch.randn(9, width, device=DEVICE) * scale_2
                x = wide[:, left : left + width]
                assert error(ops.linear(x, ours), ops.linear(x, law)) <= TWO_STEPS


def test_fp4_integers_are_exact():
    """With unit scales a result is a sum of products of small integers over four: exact in FP32, so bit-equal."""
    width, out = 784, 75
    packed = torch.randint(0, 256, (out, width // 2), dtype=torch.uint8)
    ones = torch.ones(out, width // 16).to(torch.float8_e4m3fn)
    part = WeightTensors(WeightFormat.NVFP4, packed, ones, torch.tensor(1.0), torch.tensor(1.0))
    ours, _ = both([part], "fp4")
    for rows in (1, 3, 16, 17, 60, 100, 300):
        x = e2m1.decode(torch.randint(0, 16, (rows, width), dtype=torch.uint8))
        x[:, ::16] = 6.0  # so that each block's scale is exactly 1
        exact = (2 * x).long() @ (2 * e2m1.decode(e2m1.unpack(packed))).long().T
        expected = (exact.double() / 4).float().to(BF16)
        assert torch.equal(ops.linear(x.to(BF16).to(DEVICE), ours).cpu(), expected)
        if cpu.available():
            there = ops.prepare([part], torch.device("cpu"), BF16, "fp4", backend="cpu")
            assert torch.equal(ops.linear(x.to(BF16), there), expected)


@pytest.mark.parametrize("activations", ["bf16", "fp4"])
@pytest.mark.parametrize(
    ("experts", "hidden", "inner", "k"),
    [
        (6, 272, 144, 3),
        (32, 256, 128, 4),
        (16, 1024, 256, 8),
        (12, 512, 2048, 8),
        (9, 2320, 656, 4),
        (200, 256, 128, 8),  # several entries of a list for one expert of many rows, beside many of few
    ],
)
def test_experts(experts, hidden, inner, k, activations):
    gate_up = [random_part(WeightFormat.NVFP4, inner, hidden, experts) for _ in range(2)]
    down = [random_part(WeightFormat.NVFP4, hidden, inner, experts)]
    (a, c), (b, d) = both(gate_up, activations), both(down, activations)
    for tokens in (0, 1, 2, 5, 40, 64, 200, 1100, 2500):
        ids = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]) if tokens else torch.empty(0, k).long()
        if tokens > 2:
            ids[1] = -1  # a token none of whose experts are here
            ids[:, 0] = torch.where(torch.arange(tokens) > 4, 2, ids[:, 0])  # one expert with many rows
            ids[2, -1] = -1
        ids, weights = ids.to(DEVICE), torch.rand(tokens, k, device=DEVICE)
        x = torch.randn(tokens, hidden, device=DEVICE).to(BF16) * 0.1
        actual, expected = ops.experts_mlp(x, ids, weights, a, b), ops.experts_mlp(x, ids, weights, c, d)
        if activations == "fp4":  # a hidden value that tips moves by up to a quarter: bound the mean instead
            assert (actual - expected).float().norm() <= 0.03 * expected.float().norm()
        else:
            assert error(actual, expected) <= 2 * TWO_STEPS


@pytest.mark.parametrize("cut", [*experts_wgmma.MEASURED.values(), None], ids=lambda cut: cut and str(cut.rows))
@pytest.mark.parametrize(
    ("experts", "hidden", "inner", "k"),
    [(6, 272, 144, 3), (5, 16, 16, 2), (9, 1024, 256, 8), (300, 256, 128, 2), (3, 7440, 16, 2)],
)
def test_experts_of_many_rows(experts, hidden, inner, k, cut):
    """Blocks of every number of columns, whatever `ops` would choose; NaN beside the rows and in scratch memory."""
    if cut and not experts_wgmma.available(DEVICE.index or 0):
        pytest.skip("wgmma is Hopper's alone")
    gate_up = [random_part(WeightFormat.NVFP4, inner, hidden, experts) for _ in range(2)]
    (a, c), (b, d) = both(gate_up), both([random_part(WeightFormat.NVFP4, hidden, inner, experts)])
    for tokens in (1, 17, 150, 700, 2500):
        ids = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])
        ids[:, 0] = torch.where(torch.rand(tokens) < 0.4, 2, ids[:, 0])  # one expert with many rows
        ids[torch.rand(tokens, k) < 0.3] = -1
        ids, weights, x = ids.to(DEVICE), torch.rand(tokens, k, device=DEVICE), poisoned(tokens, hidden)
        x *= 0.1  # in place: its rows keep their distance
        assert x.stride(0) != hidden
        torch.full((1 << 26,), float("nan"), dtype=BF16, device=DEVICE)  # what the allocator hands out next
        if cut:
            actual = experts_wgmma.by_blocks(x, ids, weights, a, b, cut)
        else:
            actual = cuda_experts.grouped(x, ids, weights, a, b)
        assert error(actual, ops.experts_mlp(x, ids, weights, c, d)) <= 2 * TWO_STEPS, tokens


@pytest.mark.parametrize("cut", [cut for cut in experts_wgmma.MEASURED.values() if cut.launches], ids=str)
def test_blocks_of_experts(cut):
    """Every choice is in one; an expert has as few as there can be, and all but its last fill their columns."""
    if not experts_wgmma.available(DEVICE.index or 0):
        pytest.skip("wgmma is Hopper's alone")
    counts = [0, 1, cut.first, cut.rows, cut.rows + 1, 2 * cut.rows + 3, 9 * cut.rows + 1, 77, 6000]
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[torch.randperm(sum(counts))]
    turns = experts_wgmma.Turns.of(ids[:, None].to(DEVICE), len(counts), cut)
    data, columns = turns.blocks.tolist(), range(cut.first, cut.rows + 1, cut.step)
    ends, blocks = data[:8], [data[8 + 4 * i : 11 + 4 * i] for i in range(data[7])]
    assert ends == sorted(ends)
    of = {expert: [block for block in blocks if block[0] == expert] for expert in range(len(counts))}
    for expert, count in enumerate(counts):
        parts = sorted(of[expert], key=lambda block: block[1])
        assert sum(part[2] for part in parts) == count and len(parts) == -(-count // cut.rows)
        assert all(first + rows == after for (_, first, rows), (_, after, _) in itertools.pairwise(parts))
        assert all(part[2] in columns for part in parts[:-1])
        for _, first, rows in parts:
            assert (ids[turns.order[first : first + rows].cpu()] == expert).all()
    assert turns.order.sort().values.tolist() == list(range(sum(counts)))
    for i, (_, _, rows) in enumerate(blocks):
        size = min(n for n, most in enumerate(columns) if rows <= most)
        assert (ends[size - 1] if size else 0) <= i < ends[size]


@pytest.mark.parametrize("k", [8, 40])
@pytest.mark.parametrize("placed", [False, True])
def test_sums_of_many_tokens_are_those_of_few(k, placed, monkeypatch):
    """R1's width, of which a block has a part; NaN where nothing was written."""
    tokens, width = cuda_experts._MANY_TOKENS + 3, 7168
    ids = torch.randint(-3, 9, (tokens, k), device=DEVICE)
    weights, outputs = torch.rand(tokens, k, device=DEVICE), torch.randn(tokens * k, width, device=DEVICE).to(BF16)
    places = torch.randperm(tokens * k, device=DEVICE).int() if placed else None
    rows = torch.arange(tokens * k, device=DEVICE) if places is None else places.long()
    outputs[rows[ids.flatten() < 0]] = float("nan")
    many = cuda_experts.combine(outputs, ids, weights, places)
    monkeypatch.setattr(cuda_experts, "_MANY_TOKENS", tokens + 1)
    assert torch.equal(many, cuda_experts.combine(outputs, ids, weights, places))
    used = torch.where((ids >= 0)[..., None], outputs[rows].view(tokens, k, width).float(), 0.0)
    assert error(many, (used * weights[..., None]).sum(1).to(BF16)) <= TWO_STEPS


@pytest.mark.parametrize("weight_format", [WeightFormat.PLAIN, WeightFormat.FP8_BLOCK], ids=["bf16", "fp8"])
def test_decoded_experts_need_no_answer_from_the_device(weight_format):
    gate_up, down = [random_part(weight_format, 64, 128, 8) for _ in range(2)], [random_part(weight_format, 128, 64, 8)]
    a, b = (ops.prepare(parts, DEVICE, BF16) for parts in (gate_up, down))
    c, d = (ops.prepare(parts, DEVICE, BF16, backend="reference") for parts in (gate_up, down))
    ids = torch.stack([torch.randperm(8, device=DEVICE)[:4] for _ in range(3)])
    ids[1, 2] = -1
    weights, x = torch.rand(3, 4, device=DEVICE), torch.randn(3, 128, device=DEVICE).to(BF16) * 0.1
    ops.experts_mlp(x, ids, weights, a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.experts_mlp(x, ids, weights, a, b)
    graph.replay()
    assert error(y, ops.experts_mlp(x, ids, weights, c, d)) <= 4 * TWO_STEPS  # rounded at each step, as on a CPU


def test_gated_mlp():
    (a, c), (b, d) = (
        both([random_part(WeightFormat.NVFP4, out, width) for _ in range(parts)])
        for parts, out, width in ((2, 768, 256), (1, 256, 768))
    )
    for rows in (0, 1, 9, 70, 300):
        x = torch.randn(rows, 256, device=DEVICE).to(BF16) * 0.1
        assert error(ops.gated_mlp(x, a, b), ops.gated_mlp(x, c, d)) <= 2 * TWO_STEPS


def test_norms_rotary_and_entries():
    for rows, n in ((0, 256), (1, 7168), (5, 128), (3, 1536), (2, 20), (300, 512), (2, 18432)):
        x, weight = torch.randn(rows, n, device=DEVICE).to(BF16) * 3, torch.randn(n, device=DEVICE).to(BF16)
        assert error(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)) <= TWO_STEPS
        hidden = torch.randn(rows, n, device=DEVICE).to(BF16)
        assert torch.equal(ops.add(x, hidden), x + hidden)
        y, normed = ops.add_rms_norm(x, hidden, weight, 1e-6)
        assert torch.equal(y, hidden + x) and error(normed, reference.rms_norm(y, weight, 1e-6)) <= TWO_STEPS
        other = torch.randn(rows, n, device=DEVICE).to(BF16)
        sums = ops.add_rms_norm(x, hidden, weight, 1e-6, other)
        for own, expected in zip(sums, ops.add_rms_norm(x + other, hidden, weight, 1e-6), strict=True):
            assert torch.equal(own, expected)
    for tokens, heads, d in ((0, 3, 8), (1, 16, 64), (7, 128, 64), (5, 3, 10)):
        q, angle = torch.randn(tokens, heads, d + 24, device=DEVICE).to(BF16)[..., 24:], torch.randn(tokens, d // 2)
        cos, sin = angle.cos().to(DEVICE), angle.sin().to(DEVICE)
        assert error(ops.rotary(q, cos, sin), reference.rotary(q, cos, sin)) <= TWO_STEPS
    for latent, rope in ((512, 64), (128, 32), (40, 16), (33, 8)):
        kv, weight, angle = torch.randn(5, latent + rope), torch.randn(latent), torch.randn(5, rope // 2)
        arguments = [kv.to(DEVICE, BF16), weight.to(DEVICE, BF16), 1e-6, angle.cos().to(DEVICE), angle.sin().to(DEVICE)]
        entries = ops.latent_entries(*arguments)
        assert error(entries, reference.latent_entries(*arguments)) <= TWO_STEPS
        for dtype in (BF16, torch.float8_e4m3fn):
            slots, caches = (
                torch.randperm(32, device=DEVICE)[:5],
                [torch.zeros(4, 8, latent + rope, device=DEVICE).to(dtype) for _ in range(2)],
            )
            assert torch.equal(ops.store_latents(caches[0], slots, *arguments), entries)
            ops.store_entries(caches[1], slots, entries)
            assert torch.equal(caches[0].view(torch.uint8), caches[1].view(torch.uint8))


@pytest.mark.parametrize("weight_format", list(WeightFormat), ids=lambda weight_format: weight_format.name)
@pytest.mark.parametrize(("out", "width"), [(3072, 1536), (700, 1536), (7168, 2048), (30, 4112), (4096, 7168)])
def test_norm_and_linear(weight_format, out, width):
    """Rows with kernels of their own and without; NaN beside the rows."""
    ours, law = both([random_part(weight_format, out, width)])
    bound = 4 * TWO_STEPS if weight_format is WeightFormat.FP8_BLOCK else 2 * TWO_STEPS  # the norm is rounded, too
    norm = torch.randn(width, device=DEVICE).to(BF16)
    for rows in (0, 1, 2, 4, 5, 8, 9, 20):
        x = poisoned(rows, width)
        assert error(ops.norm_linear(x, norm, 1e-6, ours), ops.norm_linear(x, norm, 1e-6, law)) <= bound, rows


@pytest.mark.parametrize(("out", "other", "width"), [(1536, 576, 7168), (40, 7, 264), (700, 3000, 512)])
def test_two_products_in_a_launch(out, other, width):
    """Outputs that end within a group, NaN beside the rows; more rows have no kernel, nor has FP8."""
    first, second = (random_part(WeightFormat.PLAIN, n, width) for n in (out, other))
    (ours, law), (ours_too, law_too) = both([first]), both([second])
    for rows in (1, 3, 8):
        x = poisoned(rows, width)
        y = ops.linear_pair(x, ours, ours_too)
        assert error(y[0], ops.linear(x, law)) <= TWO_STEPS and error(y[1], ops.linear(x, law_too)) <= TWO_STEPS, rows
    assert ops.linear_pair(poisoned(9, width), ours, ours_too) is None
    fp8, _ = both([random_part(WeightFormat.FP8_BLOCK, 16384, 512)])
    assert ops.linear_pair(poisoned(1, 512), fp8, fp8) is None


@pytest.mark.parametrize("width", [1, 4])
def test_a_step_begins(width):
    slots, starts = torch.tensor([4, 0, 2], device=DEVICE), torch.tensor([0, 9, 63, 64, 250], device=DEVICE)
    tokens = torch.randint(99, (5, width), device=DEVICE)
    tables = torch.randperm(5 * 9, device=DEVICE).view(5, 9)[:, :7]
    arguments = slots, starts, tokens, tables, 4, 64
    for own, expected in zip(ops.step_inputs(*arguments), reference.step_inputs(*arguments), strict=True):
        assert torch.equal(own, expected)
    positions, frequencies = torch.randint(160_000, (5,), device=DEVICE), torch.logspace(0, -4, 32, device=DEVICE)
    both_sides = ops.cos_sin(positions, frequencies, 1.25), reference.cos_sin(positions, frequencies, 1.25)
    for own, expected in zip(*both_sides, strict=True):
        assert (own - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=["bf16", "fp32"])
def test_argmax(dtype):
    """Of equal ones the first, zeros of both signs are equal, NaN comes before all."""
    nan, inf = float("nan"), float("inf")
    for rows, vocab in ((0, 8), (1, 8), (3, 16160), (5, 129280), (2, 12), (1, 7)):
        logits = torch.randn(rows, vocab, device=DEVICE).to(dtype)
        assert torch.equal(ops.argmax(logits), logits.argmax(-1))
    logits = torch.zeros(9, 4096, device=DEVICE, dtype=dtype)
    logits[0] = -inf
    logits[1, 7], logits[1, 4000] = inf, inf
    logits[2, 4095], logits[2, 9] = nan, inf
    logits[3, 5], logits[3, 3000] = nan, -nan
    logits[4] = -0.0
    logits[4, 50] = 0.0
    logits[5] = -1.0
    logits[5, 2048] = -0.0
    logits[6, 4095] = 1.0
    logits[7] = nan
    assert ops.argmax(logits).tolist() == [0, 7, 4095, 5, 0, 2048, 4095, 0, 0]


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize(
    ("weight_format", "activations"),
    [(weight_format, "bf16") for weight_format in WeightFormat] + [(WeightFormat.NVFP4, "fp4")],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_graph_gives_the_same_bits(weight_format, activations, rows):
    ours, _ = both([random_part(weight_format, 512, 1024)], activations)
    x = torch.randn(rows, 1024, device=DEVICE).to(BF16)
    expected = ops.linear(ops.linear(x, ours).repeat(1, 2).contiguous(), ours)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.linear(ops.linear(x, ours).repeat(1, 2).contiguous(), ours)
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("long_branch", [0, 1])
def test_branches_of_a_graph_wait(long_branch):
    """A branch for the kernel that it begins at, which lets the next begin long before it ends; what both meet at for
    the longer one, whichever it is. The branch's stream has had kernels of its own before."""
    size = 8192
    ours, _ = both([random_part(WeightFormat.PLAIN, size, size)])
    given, ones = torch.empty(1, size, dtype=BF16, device=DEVICE), torch.ones(size, dtype=BF16, device=DEVICE)

    def step() -> torch.Tensor:
        x = sum(beside(DEVICE, lambda: ops.add(given, given), lambda: ops.add(given, given)))
        y = ops.rms_norm(ops.linear(x, ours), ones, 1e-6)
        z = ops.linear(y, ours)  # takes tens of microseconds, and what follows may begin at once
        branches = [lambda: ops.linear(z, ours), lambda: ops.add(z, z)]
        return ops.add(*beside(DEVICE, branches[long_branch], branches[1 - long_branch]))

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    for _ in range(20):
        given.normal_()
        graph.replay()
        assert torch.equal(result, step())


def test_tensors_of_the_host_are_refused():
    cache, entries = torch.zeros(2, 4, 160, device=DEVICE, dtype=BF16), torch.zeros(3, 160, device=DEVICE, dtype=BF16)
    with pytest.raises(ValueError, match="these are on cpu, cuda:0"):
        ops.store_entries(cache, torch.arange(3), entries)
    weight = ops.prepare([random_part(WeightFormat.NVFP4, 16, 32)], DEVICE, BF16)
    with pytest.raises(ValueError, match="must be on one GPU"):
        ops.linear(torch.zeros(1, 32, dtype=BF16), weight)


def test_what_has_no_kernel_is_decoded():
    for weight_format in WeightFormat:
        assert ops.prepare([random_part(weight_format, 16, 32)], DEVICE, torch.float32).backend is not cuda
    weight = ops.prepare([random_part(WeightFormat.NVFP4, 16, 32)], DEVICE, BF16)
    with pytest.raises(ValueError, match="multiply BF16 activations"):
        ops.linear(torch.randn(2, 32, device=DEVICE), weight)
