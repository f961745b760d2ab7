"""The CUDA kernels at DeepSeek-R1's shapes against this card's memory and arithmetic, torch, and humming if installed.

    python benchmarks/cuda_kernels.py [--json FILE] [--only NAME ...] [--rows N ...] [--dry]

A side is captured in a CUDA graph that calls it with one weight after the other, over 250 MB of them at least, so that
no cache helps; the median of replays is printed, in microseconds a call. The roof is the larger of the bytes at the
read rate (a sum of FP32 over 2 GiB) and the operations at the rate of torch's BF16 product of 8192 x 8192 x 8192, both
measured here first. --dry prints every shape and its cut, and needs no GPU.

groups: products, dense, experts, attention, prompts, small, rounding (no times: what FP8 and FP4 activations cost in
the output)
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import cuda, ops, reference
from deepseek_fp4_plugin.kernels.cuda import cuts, experts_wgmma, fp8, matvec
from deepseek_fp4_plugin.kernels.cuda import dense as dense_kernel
from deepseek_fp4_plugin.kernels.cuda.experts import expected_rows, residence, team_of
from deepseek_fp4_plugin.kernels.cuda.launcher import MAX_SHARED
from deepseek_fp4_plugin.kernels.cuda.linear import MANY_ROWS, geometry
from deepseek_fp4_plugin.kernels.cuda.moe import LISTED_ROWS_HOPPER, few_tokens
from deepseek_fp4_plugin.kernels.spans import Spans
from deepseek_fp4_plugin.kernels.weights import Activations, Case, PreparedRouter, PreparedWeight, WeightTensors
from deepseek_fp4_plugin.numerics import nvfp4

BF16, DEVICE = torch.bfloat16, torch.device("cuda")
FP8 = Case(DEVICE, BF16, WeightFormat.NVFP4, "fp8")
ROTATED = 250_000_000  # bytes
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 56, 64)
ROWS += (96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
# out, in of R1's NVFP4 linears: whole, and as one of eight tensor-parallel ranks has them.
SHAPES = {
    "shared gate, up": (4096, 7168),
    "shared down": (7168, 2048),
    "shared gate, up of TP8": (512, 7168),
    "shared down of TP8": (7168, 256),
    "dense gate, up of TP8": (4608, 7168),
    "dense down of TP8": (7168, 2304),
    "dense gate, up": (36864, 7168),
    "dense down": (7168, 18432),
    "o_proj of TP8": (7168, 2048),
    "o_proj": (7168, 16384),
}
# Experts of one rank of eight: how many it holds, and how much of their hidden values.
EXPERTS = {"TP8": (256, 256), "TP8/EP2": (128, 512), "EP8": (32, 2048)}
# Those that stay BF16 in an NVFP4 checkpoint, and are FP8 in the published one: attention's, whole and of TP8.
DENSE_SHAPES = {
    "q_a": (1536, 7168),
    "kv_a": (576, 7168),
    "q_a and kv_a": (2112, 7168),
    "q_b": (24576, 1536),
    "q_b of TP8": (3072, 1536),
    "o_proj": (7168, 16384),
    "o_proj of TP8": (7168, 2048),
    "4096 x 7168": (4096, 7168),
}
ATTENTION = tuple(
    itertools.product((16, 128), (1, 4), ((1, 1024), (1, 4096), (1, 32768), *((n, 4096) for n in (4, 16, 64, 128))))
)

# Prompts that attend together: each one's tokens in a step, and all that it sees.
PROMPTS = (((64,) * 64, (64,) * 64), ((512,) * 8, (512,) * 8), ((512,) * 4, (1024,) * 4), ((2048,), (32768,)))


@dataclass
class Row:
    operation: str
    shape: str
    rows: int
    microseconds: float
    bytes: float
    flops: float
    fraction_of_roof: float
    routed: float | None = None  # rows that experts here were chosen for, of calls with choices of their own the mean


class Bench:
    """The card's two roofs and what was measured."""

    def __init__(self) -> None:
        memory = torch.empty(1 << 31, dtype=torch.uint8, device=DEVICE).random_().view(torch.int32).view(torch.float32)
        self.bandwidth = 4e6 * memory.numel() / timed([partial(torch.sum, memory)])
        a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=BF16) for _ in range(2))
        self.rate = 2e6 * 8192**3 / timed([lambda: a @ b])
        self.rows: list[Row] = []
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        print(f"read {self.bandwidth / 1e9:.0f} GB/s, torch BF16 {self.rate / 1e12:.0f} TFLOP/s")

    def add(
        self,
        operation: str,
        shape: str,
        rows: int,
        size: float,
        flops: float,
        calls: list[Callable],
        routed: float | None = None,
    ) -> None:
        microseconds = timed(calls)
        roof = max(size / self.bandwidth, flops / self.rate) * 1e6
        self.rows.append(Row(operation, shape, rows, microseconds, size, flops, roof / microseconds, routed))
        print(
            f"{operation:<24}{shape:<34}{rows:>6}{microseconds:>10.2f} us{size / microseconds / 1e3:>8.0f} GB/s"
            f"{flops / microseconds / 1e6:>8.1f} TFLOP/s{roof / microseconds:>7.2f} of roof"
            + ("" if routed is None else f", {routed:.0f} rows here"),
            flush=True,
        )


def timed(calls: list[Callable], replays: int = 11) -> float:
    """Microseconds a call: the median of replays of a graph of them all."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[2:])


def random_part(out: int, width: int, experts: int = 0) -> WeightTensors:
    lead = (experts,) if experts else ()
    packed = torch.randint(0, 256, (*lead, out, width // 2), dtype=torch.uint8, device=DEVICE)
    scale = torch.randint(40, 90, (*lead, out, width // 16), dtype=torch.uint8, device=DEVICE)
    return WeightTensors(WeightFormat.NVFP4, packed, scale.view(torch.float8_e4m3fn), torch.full(lead, 1e-2))


def prepared(parts: list[WeightTensors], activations: Activations = "bf16") -> PreparedWeight:
    weight = ops.prepare(parts, DEVICE, BF16, activations, backend="cuda")
    return weight


def random_router(experts: int, hidden: int) -> Tensor:
    """FP32 numbers that are BF16, as R1's are."""
    return (torch.randn(experts, hidden, device=DEVICE) / hidden**0.5).bfloat16().float()


def nvfp4_bytes(out: int, width: int) -> float:
    return out * width * 9 / 16


def copies(size: float) -> int:
    return max(4, int(ROTATED // size) + 1)


def humming_layers(parts: list[WeightTensors]) -> list[Callable[[Tensor], Tensor]]:
    """humming-kernels' layers of the same weights, or nothing where it is not installed."""
    try:
        from humming.layer import HummingLayer
    except ImportError:
        return []
    layers = []
    for part in parts:
        layer = HummingLayer(
            shape_n=part.out_features,
            shape_k=part.in_features,
            weight_config={"quant_method": "modelopt", "quant_algo": "nvfp4"},
            torch_dtype=BF16,
        ).cuda()
        scale_2 = part.scale_2.to(DEVICE).view(1)
        layer.load_from_tensors({"weight": part.weight, "weight_scale": part.scale, "weight_scale_2": scale_2})
        layer.transform()
        layers.append(layer)
    return layers


def products(bench: Bench, rows: list[int]) -> None:
    for name, (out, width) in SHAPES.items():
        size = nvfp4_bytes(out, width)
        parts = [random_part(out, width) for _ in range(min(64, copies(size)))]
        ours, peers = [prepared([part]) for part in parts], humming_layers(parts)
        rounded = [] if cuda.refuses(FP8) else [prepared([part], "fp8") for part in parts]
        plain = [torch.randn(out, width, device=DEVICE, dtype=BF16) for _ in range(copies(2 * out * width))]
        for count in rows:
            x = torch.randn(count, width, device=DEVICE, dtype=BF16)
            moved, flops, shape = 2.0 * count * (out + width), 2.0 * count * out * width, f"{name} {out} x {width}"
            bench.add("w4a16", shape, count, size + moved, flops, [partial(ops.linear, x, w) for w in ours])
            if rounded and fp8.serves(count, rounded[0]):
                bench.add("fp8", shape, count, size + moved, flops, [partial(ops.linear, x, w) for w in rounded])
            if peers:
                bench.add("humming", shape, count, size + moved, flops, [partial(w, x) for w in peers])
            library = [partial(torch.nn.functional.linear, x, w) for w in plain]
            bench.add("torch bf16", shape, count, 2 * out * width + moved, flops, library)
        del parts, ours, rounded, peers, plain
        torch.cuda.empty_cache()


def dense(bench: Bench, rows: list[int]) -> None:
    """BF16 and FP8 weights, few rows; at most 16."""
    for name, (out, width) in DENSE_SHAPES.items():
        size = 2.0 * out * width
        plain = [torch.randn(out, width, device=DEVICE, dtype=BF16) for _ in range(copies(size))]
        ones = torch.rand(-(-out // 128), -(-width // 128), device=DEVICE)
        sides = {
            "bf16": [WeightTensors(WeightFormat.PLAIN, weight) for weight in plain],
            "fp8": [WeightTensors(WeightFormat.FP8_BLOCK, w.to(torch.float8_e4m3fn), ones) for w in plain * 2],
        }
        for side, parts in sides.items():
            weights = [prepared([part]) for part in parts]
            for count in (n for n in rows if n <= 16):
                x = torch.randn(count, width, device=DEVICE, dtype=BF16)
                moved, flops = 2.0 * count * (out + width), 2.0 * count * out * width
                fewer = size / 2 if side == "fp8" else size
                bench.add(
                    side,
                    f"{name} {out} x {width}",
                    count,
                    fewer + moved,
                    flops,
                    [partial(ops.linear, x, w) for w in weights],
                )
                if side == "bf16":
                    library = [partial(torch.nn.functional.linear, x, w) for w in plain]
                    bench.add("torch bf16", f"{name} {out} x {width}", count, size + moved, flops, library)
            del weights
        del plain, sides
        torch.cuda.empty_cache()
    pair(bench, rows)


def pair(bench: Bench, rows: list[int]) -> None:
    """q_a and kv_a in one launch, and the launch that absorbs queries and stores latents: 16 heads, at most 8 rows."""
    sizes = [DENSE_SHAPES[name] for name in ("q_a", "kv_a")]
    size = sum(2.0 * out * width for out, width in sizes)
    weights = [[plain_weight(*shape) for shape in sizes] for _ in range(copies(size))]
    heads, nope, v, latent, rope = 16, 128, 128, 512, 64
    absorbed = 2.0 * heads * nope * latent
    kv_b = [plain_weight(heads * (nope + v), latent) for _ in range(copies(absorbed))]
    norm, cache = (
        torch.randn(latent, device=DEVICE, dtype=BF16),
        torch.zeros(8, 64, latent + rope, device=DEVICE).to(BF16),
    )
    for count in (n for n in rows if n <= 8):
        x = torch.randn(count, 7168, device=DEVICE, dtype=BF16)
        flops = count * size
        bench.add(
            "bf16", "q_a and kv_a in a launch", count, size, flops, [partial(ops.linear_pair, x, *w) for w in weights]
        )
        q = torch.randn(count, heads, nope + rope, device=DEVICE, dtype=BF16)
        kv, angle = (
            torch.randn(count, latent + rope, device=DEVICE, dtype=BF16),
            torch.randn(count, rope // 2, device=DEVICE),
        )
        latents = cache, torch.arange(count, device=DEVICE), kv, norm, 1e-6
        calls = [partial(ops.absorb_and_store, q[..., :nope], q[..., nope:], w, angle, angle, *latents) for w in kv_b]
        bench.add("absorb_and_store", "16 heads", count, absorbed, count * absorbed, calls)


def plain_weight(out: int, width: int) -> PreparedWeight:
    return prepared([WeightTensors(WeightFormat.PLAIN, torch.randn(out, width, device=DEVICE, dtype=BF16))])


def experts(bench: Bench, rows: list[int]) -> None:
    for name, (count, inner) in EXPERTS.items():
        experts_of_rank(bench, rows, name, count, inner)
        torch.cuda.empty_cache()


def experts_of_rank(bench: Bench, rows: list[int], name: str, count: int, inner: int) -> None:
    """A rank's `count` experts of 256, 8 a token: alone, and from normed hidden states on."""
    total, hidden, k = 256, 7168, 8
    routing = k, 8, 4, True, 2.5
    gate_up, down = (
        prepared([random_part(inner, hidden, count) for _ in range(2)]),
        prepared([random_part(hidden, inner, count)]),
    )
    here = torch.arange(total, device=DEVICE)
    slots, shape = torch.where(here < count, here, -1), f"{name}: {count} of {total}, {inner} x {hidden}"
    # Those of different layers: each with a bias of its own.
    biases = [torch.randn(total, device=DEVICE) * 0.01 for _ in range(16)]
    routers = [ops.prepare_router(random_router(total, hidden), bias, BF16) for bias in biases]

    def routed(x: Tensor, router: PreparedRouter) -> Tensor:
        if count < total:
            found = ops.placed_router(x, router, slots, *routing)
            assert found
            _, own, ids = found
        else:
            ids, own = ops.router(x, router, *routing)
        return ops.experts_mlp(x, ids, own, gate_up, down)

    for tokens in rows:
        states = [torch.randn(tokens, hidden, device=DEVICE, dtype=BF16) for _ in range(32 if tokens <= 64 else 6)]
        choices = [slots[torch.rand(tokens, total, device=DEVICE).topk(k).indices] for _ in states]
        weights = torch.rand(tokens, k, device=DEVICE)
        size, flops, chosen = experts_work(choices, inner, hidden)
        alone = [
            partial(ops.experts_mlp, x, ids, weights, gate_up, down) for ids, x in zip(choices, states, strict=True)
        ]
        bench.add("experts", shape, tokens, size, flops, alone, chosen)
        pairs = list(zip(states, itertools.cycle(routers), strict=False))
        size, flops, chosen = experts_work([slots[ops.router(x, r, *routing)[0]] for x, r in pairs], inner, hidden)
        whole = [lambda x=x, r=r: routed(x, r) for x, r in pairs]
        bench.add("experts with router", shape, tokens, size + 2 * total * hidden, flops, whole, chosen)


def experts_work(choices: list[Tensor], inner: int, hidden: int) -> tuple[float, float, float]:
    """Bytes of the experts that these ids chose here, operations of their rows, and how many rows: means."""
    active = statistics.mean(len(ids[ids >= 0].unique()) for ids in choices)
    chosen = statistics.mean(int((ids >= 0).sum()) for ids in choices)
    return active * nvfp4_bytes(3 * inner, hidden), 6.0 * chosen * hidden * inner, chosen


def attention(bench: Bench, rows: list[int]) -> None:
    """R1's latent attention; rows here are requests."""
    for heads, queries, (requests, context) in ATTENTION:
        for dtype in (BF16, torch.float8_e4m3fn):
            pages, size = context // 64, requests * context * 576 * dtype.itemsize
            caches = [
                torch.randn(requests * pages, 64, 576, device=DEVICE).to(dtype) for _ in range(min(8, copies(size)))
            ]
            q = torch.randn(requests * queries, heads, 576, device=DEVICE, dtype=BF16)
            tables = torch.randperm(requests * pages, device=DEVICE).view(requests, pages)
            starts = torch.arange(requests + 1, device=DEVICE) * queries
            sizes = tables, starts, torch.full((requests,), context, device=DEVICE), queries, context, 0.07
            name = f"{heads} heads, {queries} queries, {context}"
            flops = 2.0 * requests * queries * heads * context * (576 + 512)
            calls = [partial(ops.absorbed_attention, q[..., :512], q[..., 512:], cache, *sizes) for cache in caches * 2]
            bench.add(f"mla {'bf16' if dtype is BF16 else 'fp8'} cache", name, requests, size, flops, calls)
            del caches, calls
            torch.cuda.empty_cache()


def prompts(bench: Bench, rows: list[int]) -> None:
    """R1's expanded attention of several prompts, in one launch and one after the other; rows here are tokens."""
    for heads, (queries, contexts) in itertools.product((16, 128), PROMPTS):
        spans = Spans.of(queries, contexts, DEVICE)
        q = torch.randn(sum(queries), heads, 192, device=DEVICE, dtype=BF16)
        k, v = (torch.randn(sum(contexts), heads, d, device=DEVICE, dtype=BF16) for d in (192, 128))
        alone = [
            (q[asking], k[seen], v[seen], 0.07, Spans.of([length], [context], DEVICE))
            for (asking, seen), length, context in zip(spans.rows(), queries, contexts, strict=True)
        ]
        seen = sum(length * (context - (length - 1) / 2) for length, context in zip(queries, contexts, strict=True))
        name = f"{heads} heads, {len(queries)} x {queries[0]} of {contexts[0]}"
        size = 2.0 * (q.numel() + k.numel() + v.numel() + len(q) * heads * 128)
        sides = {"prompts": lambda c=(q, k, v, 0.07, spans): ops.expanded_attention(*c)}
        if len(alone) > 1:
            sides["prompts, one by one"] = lambda c=alone: [ops.expanded_attention(*one) for one in c]
        for side, call in sides.items():
            bench.add(side, name, len(q), size, 2.0 * heads * seen * (192 + 128), [call] * 4)


def small(bench: Bench, rows: list[int]) -> None:
    for count in (n for n in rows if n <= 64):
        x, weight = torch.randn(count, 7168, device=DEVICE, dtype=BF16), torch.randn(7168, device=DEVICE, dtype=BF16)
        q, angle = torch.randn(count, 16, 64, device=DEVICE, dtype=BF16), torch.randn(count, 32, device=DEVICE)
        kv, norm = torch.randn(count, 576, device=DEVICE, dtype=BF16), torch.randn(512, device=DEVICE, dtype=BF16)
        logits, bias = torch.randn(count, 256, device=DEVICE), torch.randn(256, device=DEVICE)
        router = random_router(256, 7168)
        routers = {backend: backend.prepare_router(router) for backend in (cuda, reference)}
        sides: list[tuple[str, float, Callable]] = [
            ("rms_norm", 4 * x.numel(), lambda b, x=x, w=weight: b.rms_norm(x, w, 1e-6)),
            ("rotary", 4 * q.numel(), lambda b, q=q, a=angle: b.rotary(q, a, a)),
            ("latent_entries", 4 * kv.numel(), lambda b, v=kv, w=norm, a=angle: b.latent_entries(v, w, 1e-6, a, a)),
            ("route", 4 * logits.numel(), lambda b, x=logits, o=bias: b.route(x, o, 8, 8, 4, True, 2.5)),
            ("router", 2 * router.numel(), lambda b, x=x, w=routers, o=bias: b.router(x, w[b], o, 8, 8, 4, True, 2.5)),
        ]
        for name, size, call in sides:
            bench.add(name, "", count, size, 0.0, [lambda f=call: f(cuda)] * 50)
            bench.add(f"{name}, torch", "", count, size, 0.0, [lambda f=call: f(reference)] * 20)


def rounding(bench: Bench, rows: list[int]) -> None:
    """The change of the output in percent of its energy: by NVFP4 weights, and by activations beside exact ones."""
    out, width, count = 4096, 7168, 512
    exact = torch.randn(out, width, device=DEVICE).to(BF16) * 0.02
    packed, scale, scale_2 = nvfp4.quantize(exact)
    student = torch.distributions.StudentT(torch.tensor(3.0, device=DEVICE))
    outliers = torch.randn(count, width, device=DEVICE)
    outliers[:, 0] = 100
    inputs = {
        "normal": torch.randn(count, width, device=DEVICE),
        "Student's t, 3 degrees": student.sample((count, width)),
        "normal, one value of 100 a row": outliers,
    }
    for name, x in inputs.items():
        x = x.to(BF16)
        part = WeightTensors(WeightFormat.NVFP4, packed, scale, scale_2, x.abs().max().float() / (6 * 448))
        true = x.float() @ exact.float().T
        law = ops.linear(x, ops.prepare([part], DEVICE, BF16, backend="reference")).float()
        kinds: tuple[Activations, ...] = ("bf16", "fp4") if cuda.refuses(FP8) else ("bf16", "fp8", "fp4")
        for kind in kinds:
            y = ops.linear(x, prepared([part], kind)).float()
            change, whole = ((y - side).square().sum() / side.square().sum() * 100 for side in (law, true))
            print(f"{kind:<6}{name:<34}{change:>9.4f} % beside exact activations, {whole:.4f} % beside BF16 weights")


def dry(rows: list[int]) -> Iterator[str]:
    """Every product's cut, on a Hopper GPU, checked against what a block can have."""
    for name, (out, width) in SHAPES.items():
        for count in rows:
            kernel = cuts.on_hopper if count > 8 else matvec.choose
            chosen = kernel(-(-out // 16), -(-width // 128), count)
            if chosen:
                assert chosen.shared <= MAX_SHARED
                yield f"{name} {out} x {width}, {count} rows: {chosen}, {chosen.shared} bytes of shared memory"
                continue
            if count > MANY_ROWS:
                yield f"{name} {out} x {width}, {count} rows: decoded once, the library's product"
                continue
            cut = geometry(-(-out // 16), -(-width // 128), count)
            assert cut.shared <= MAX_SHARED and cut.warps_m * cut.warps_k <= (16 if cut.columns <= 2 else 8)
            yield f"{name} {out} x {width}, {count} rows: {cut}, {cut.shared} bytes of shared memory"
    for name, (count, inner) in EXPERTS.items():
        for tokens in rows:
            each = expected_rows(tokens, 8, count)
            if each > LISTED_ROWS_HOPPER:
                blocks = experts_wgmma.blocks_for(each)
                assert all(blocks.of(columns).shared * blocks.resident <= MAX_SHARED for columns in blocks.columns)
                yield f"experts of {name}, {tokens} tokens: {blocks}, {blocks.shared} bytes of shared memory"
                continue
            if few_tokens(tokens, 8, -(-inner // 128)):
                first = matvec.choose_experts(inner // 8, 7168 // 128, max(2, round(each * count)), 8 * tokens)
                assert first.shared * first.resident <= MAX_SHARED
                yield f"experts of {name}, {tokens} tokens: {first}, {first.shared} bytes of shared memory"
                continue
            fit, teams = residence(tokens, 8, count), [team_of(-(-width // 128)) for width in (7168, inner)]
            assert all(fit.shared(team) * fit.blocks <= MAX_SHARED for team in teams)
            yield f"experts of {name}, {tokens} tokens: {fit}, teams of {teams} warps"
    for name, (out, width) in DENSE_SHAPES.items():
        for bits in (16, 8):
            for count in (n for n in rows if dense_kernel.served(n, out, width, bits == 8)):
                own = dense_kernel.geometry(out, width * bits // 8, count, bits == 8)
                assert own.shared <= MAX_SHARED
                yield f"{name} {out} x {width} of {bits} bits, {count} rows: {own}, {own.shared} bytes of shared memory"


def main() -> None:
    groups = {
        "products": products,
        "dense": dense,
        "experts": experts,
        "attention": attention,
        "prompts": prompts,
        "small": small,
        "rounding": rounding,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--only", nargs="+", choices=groups, default=list(groups))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--dry", action="store_true", help="print every shape's cut; needs no GPU")
    options = parser.parse_args()
    if options.dry:
        print("\n".join(dry(options.rows)))
        return
    refused = cuda.refuses(Case(DEVICE, BF16, WeightFormat.NVFP4))
    if refused:
        raise SystemExit(f"no CUDA kernels here: {refused}")
    bench = Bench()
    with torch.inference_mode():
        for name in options.only:
            groups[name](bench, options.rows)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {"device": torch.cuda.get_device_name(), "rows": [asdict(row) for row in bench.rows]}, file, indent=1
            )


if __name__ == "__main__":
    main()
