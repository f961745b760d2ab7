"""Every CPU operation against this machine's memory and arithmetic, torch's products and the reference.

    python benchmarks/kernels.py [--json FILE] [--only NAME ...] [--rows N ...] [--repeats 15] [--threads N]
        [--path avx2]

The roof of a row is the larger of two times: its bytes at the read bandwidth, its operations at the rate of torch's
product of 2048 x 2048 x 2048, in BF16 or FP32, whichever is faster here. Both are measured in between the operations'
turns, and all sides of a group take turns, so that a busy machine slows all of them; medians are printed. Every side
runs for 8 ms before it is timed; one that takes long has fewer turns. Weights rotate over at least 512 MB, and the
bandwidth is that of reading as much: no cache helps.

To measure a processor with AVX-512 as if it had none, mask it for torch as well:

    export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
    python benchmarks/kernels.py --path avx2

groups: products, experts, attention, small, threads
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import cpu, decoded, ops, reference
from deepseek_fp4_plugin.kernels.cpu.extension import native
from deepseek_fp4_plugin.kernels.weights import Activations, PreparedWeight, WeightTensors

ROTATED = 512 << 20  # bytes
A_CASE = 0.5  # seconds of a case's timed calls, after which it has no more turns than two
CPU, BF16 = torch.device("cpu"), torch.bfloat16
SHAPES = ((7168, 7168), (2048, 7168), (7168, 2048))  # out, in: a square one, and the two of R1's experts
FP4_SCALE = torch.tensor(2e-3)
EXPERT_KINDS: tuple[tuple[str, Activations], ...] = (
    ("experts w4a16", "bf16"),
    ("experts w4a8", "int8"),
    ("experts w4a4", "fp4"),
)


@dataclass
class Row:
    operation: str
    shape: str
    rows: int
    seconds: float
    bytes: int
    flops: int
    fraction_of_roof: float
    threads: int


@dataclass
class Case:
    """One side of a group. call() does the operation once, with the next of its weights."""

    operation: str
    shape: str
    rows: int
    bytes: int
    flops: int
    call: Callable[[], object]


class Machine:
    """The two roofs, measured between other things."""

    def __init__(self) -> None:
        self.memory = torch.ones(ROTATED, dtype=torch.uint8)
        square = torch.randn(2048, 2048)
        small = square[:256, :256].contiguous()  # BF16 without hardware for it takes seconds for more
        self.dtype = min((BF16, torch.float32), key=lambda dtype: _product_seconds(small.to(dtype)))
        self.square = square.to(self.dtype)
        self.bandwidths: list[float] = []
        self.rates: list[float] = []

    def measure(self, threads: int) -> None:
        self.rates.append(2 * 2048**3 / settled(lambda: self.square @ self.square, 1))
        rest()
        self.bandwidths.append(ROTATED / settled(lambda: native.read(self.memory.data_ptr(), ROTATED, threads), 1))


def _product_seconds(square: Tensor) -> float:
    return settled(lambda: square @ square, 10)


def rest() -> None:
    """torch's threads look for more work for a while after a product, on processors that the next side needs."""
    time.sleep(0.02)


def settled(call: Callable[[], object], times: int) -> float:
    """Seconds a call, after 8 ms of the same untimed: the clock rises for so long under AVX-512."""
    until = time.perf_counter() + 8e-3
    while time.perf_counter() < until:
        call()
    return timed(call, times)


def timed(call: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


def run_group(cases: list[Case], repeats: int, threads: int) -> list[Row]:
    machine = Machine()
    torch.set_num_threads(threads)
    seconds: list[list[float]] = [[] for _ in cases]
    first = [timed(case.call, 1) for case in cases]
    for turn in range(repeats):
        machine.measure(threads)
        for index, case in enumerate(cases):
            if turn * max(first[index], 8e-3) > A_CASE and turn > 1:
                continue
            if "torch" in cases[index - 1].operation:
                rest()
            measure = timed if first[index] > A_CASE else settled
            seconds[index].append(measure(case.call, max(1, int(8e-3 / max(first[index], 1e-7)))))
    bandwidth, rate = statistics.median(machine.bandwidths), statistics.median(machine.rates)
    product = str(machine.dtype).removeprefix("torch.")
    print(f"\nread bandwidth {bandwidth / 1e9:.1f} GB/s, torch {product} {rate / 1e9:.0f} GFLOP/s, {threads} threads")
    print(f"{'operation':<22}{'shape':<22}{'rows':>5}{'ms':>10}{'GB/s':>8}{'GFLOP/s':>9}{'of roof':>9}")
    rows = []
    for case, own in zip(cases, seconds, strict=True):
        median = statistics.median(own)
        roof = max(case.bytes / bandwidth, case.flops / rate)
        row = Row(case.operation, case.shape, case.rows, median, case.bytes, case.flops, roof / median, threads)
        rows.append(row)
        print(
            f"{row.operation:<22}{row.shape:<22}{row.rows:>5}{median * 1e3:>10.3f}{case.bytes / median / 1e9:>8.1f}"
            f"{case.flops / median / 1e9:>9.0f}{row.fraction_of_roof:>9.2f}",
            flush=True,
        )
    return rows


def random_weight(weight_format: WeightFormat, *shape: int) -> WeightTensors:
    """Random values with plausible scales; one projection, or a stack of them."""
    *lead, out, width = shape
    if weight_format is WeightFormat.PLAIN:
        return WeightTensors(weight_format, normal(out, width).to(BF16))
    if weight_format is WeightFormat.FP8_BLOCK:
        codes = (normal(*shape) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)  # as 128 x 128 with one scale are
        return WeightTensors(weight_format, codes, torch.rand(*lead, -(-out // 128), -(-width // 128)))
    packed = torch.randint(0, 256, (*lead, out, width // 2), dtype=torch.uint8)
    scale = torch.randint(40, 90, (*lead, out, width // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return WeightTensors(weight_format, packed, scale, torch.full(lead, 1e-2), FP4_SCALE)


def normal(*shape: int) -> Tensor:
    """The same 65,536 values again and again."""
    size = math.prod(shape)
    return torch.randn(1 << 16).repeat(-(-size >> 16))[:size].view(shape)


def weight_bytes(part: WeightTensors) -> int:
    scale = 0 if part.scale is None else part.scale.numel() * part.scale.element_size()
    return part.weight.numel() * part.weight.element_size() + scale


def rotating(parts: list[WeightTensors], backend: str, activations: Activations = "bf16") -> Iterator[PreparedWeight]:
    return itertools.cycle([ops.prepare([part], CPU, BF16, activations, backend) for part in parts])


def products(shape: tuple[int, int]) -> list[Case]:
    out, width = shape
    cases: list[Case] = []

    def weights(weight_format: WeightFormat) -> list[WeightTensors]:
        first = random_weight(weight_format, out, width)
        return [first] + [random_weight(weight_format, out, width) for _ in range(ROTATED // weight_bytes(first))]

    def add(name: str, rows: int, moved: int, call: Callable[[Tensor], object], dtype: torch.dtype = BF16) -> None:
        x = torch.randn(rows, width).to(dtype)
        moved += dtype.itemsize * rows * (out + width)
        cases.append(Case(name, f"{out} x {width}", rows, moved, 2 * rows * out * width, lambda: call(x)))

    nvfp4, fp8, plain = (weights(f) for f in (WeightFormat.NVFP4, WeightFormat.FP8_BLOCK, WeightFormat.PLAIN))
    w4a16, w4a8, w4a4 = (rotating(nvfp4, "cpu", activations) for _, activations in EXPERT_KINDS)
    w8a16, w16a16, law = rotating(fp8, "cpu"), rotating(plain, "cpu"), rotating(nvfp4, "reference")
    bf16 = itertools.cycle([part.weight for part in plain])
    fp32 = itertools.cycle([part.weight.float() for part in plain[: -(-len(plain) // 2)]])
    linear = torch.nn.functional.linear
    for rows in (1, 2, 4, 8, 16, 64, 512):
        add("w4a16", rows, weight_bytes(nvfp4[0]), lambda x: cpu.linear(x, next(w4a16)))
        add("w4a8", rows, weight_bytes(nvfp4[0]), lambda x: cpu.linear(x, next(w4a8)))
        add("w4a4", rows, weight_bytes(nvfp4[0]), lambda x: cpu.linear(x, next(w4a4)))
        add("w8a16", rows, weight_bytes(fp8[0]), lambda x: cpu.linear(x, next(w8a16)))
        add("bf16", rows, weight_bytes(plain[0]), lambda x: cpu.linear(x, next(w16a16)))
        add("torch bf16", rows, weight_bytes(plain[0]), lambda x: linear(x, next(bf16)))
        add("torch fp32", rows, 2 * weight_bytes(plain[0]), lambda x: linear(x, next(fp32)), torch.float32)
    add("reference w4a16", 1, weight_bytes(nvfp4[0]), lambda x: reference.linear(x, next(law)))
    return cases


def experts() -> list[Case]:
    """R1's experts, 24 of them (600 MB), 8 a token. Gates are about normal, as behind a norm: the SiLU of -20 is so
    near zero that exact activations without AVX-512 would hold little else than exceptions."""
    count, hidden, inner, k = 24, 7168, 2048, 8
    parts = [
        replace(random_weight(WeightFormat.NVFP4, count, *shape), scale_2=torch.full((count,), 5e-4))
        for shape in ((inner, hidden), (inner, hidden), (hidden, inner))
    ]
    each = sum(weight_bytes(part) for part in parts) // count
    cases = []
    for tokens in (1, 4, 64):
        choices = [torch.stack([torch.randperm(count)[:k] for _ in range(tokens)]) for _ in range(16)]
        ids = itertools.cycle(choices)
        active = round(sum(len(choice.unique()) for choice in choices) / len(choices))
        weights, x = torch.rand(tokens, k), torch.randn(tokens, hidden).to(BF16)
        flops = 2 * 3 * tokens * k * hidden * inner
        for name, activations in EXPERT_KINDS:
            gate_up = ops.prepare(parts[:2], CPU, BF16, activations, "cpu")
            down = ops.prepare(parts[2:], CPU, BF16, activations, "cpu")

            def fused(x=x, weights=weights, ids=ids, gate_up=gate_up, down=down):
                return cpu.experts_mlp(x, next(ids), weights, gate_up, down)

            def looped(x=x, weights=weights, ids=ids, gate_up=gate_up, down=down):
                return reference.experts_mlp(x, next(ids), weights, gate_up, down)

            shape = f"{k} of {count}, {inner} x {hidden}"
            cases.append(Case(name, shape, tokens, active * each, flops, fused))
            if activations == "bf16":
                cases.append(Case("the same, one by one", shape, tokens, active * each, flops, looped))
    return cases


def attention() -> list[Case]:
    """R1's 128 heads over caches of one layer; the caches rotate where they are small."""
    heads, latent, rope, block = 128, 512, 64, 32
    cases = []
    for dtype, name in ((BF16, "bf16"), (torch.float8_e4m3fn, "fp8")):
        for context in (512, 4096, 32768):
            blocks = context // block
            size = context * (latent + rope) * dtype.itemsize
            copies = max(1, ROTATED // 4 // size)
            cache = torch.randn(blocks, block, latent + rope).to(dtype).repeat(copies, 1, 1)
            tables = itertools.cycle([torch.arange(i * blocks, (i + 1) * blocks).unsqueeze(0) for i in range(copies)])
            for rows in (1, 4):
                q = torch.randn(rows, heads, latent + rope).to(BF16)
                lens, start = torch.tensor([context]), torch.tensor([0, rows])

                def attend(
                    backend, q=q, cache=cache, tables=tables, start=start, lens=lens, rows=rows, context=context
                ):
                    return backend.absorbed_attention(
                        q[..., :latent], q[..., latent:], cache, next(tables), start, lens, rows, context, 0.07
                    )

                flops = 2 * rows * heads * context * (2 * latent + rope)
                shape = f"context {context}"
                cases.append(Case(f"mla {name}", shape, rows, size, flops, lambda f=attend: f(cpu)))
                cases.append(Case(f"mla {name}, torch", shape, rows, size, flops, lambda f=attend: f(decoded)))
    return cases


def small() -> list[Case]:
    cases = []
    for rows in (1, 16):
        x, weight = torch.randn(rows, 7168).to(BF16), torch.ones(7168, dtype=BF16)
        q, angle = torch.randn(rows, 128, 64).to(BF16), torch.randn(rows, 32)
        logits, bias = torch.randn(rows, 256), torch.zeros(256)
        own, tables = torch.arange(rows), torch.zeros(rows, 128, dtype=torch.int64)
        slots = (own, own, own.unsqueeze(1), tables, 128, 32)
        sides = [
            ("norm", "7168", 4 * x.numel(), lambda b, x=x, w=weight: b.rms_norm(x, w, 1e-6)),
            ("rotary", "128 heads of 64", 4 * q.numel(), lambda b, q=q, a=angle: b.rotary(q, a, a)),
            ("route", "8 of 256", 4 * logits.numel(), lambda b, x=logits, o=bias: b.route(x, o, 8, 8, 4, True, 2.5)),
            ("step inputs", "128 blocks", 16 * tables.numel(), lambda b, s=slots: b.step_inputs(*s)),
        ]
        for name, shape, moved, call in sides:
            cases.append(Case(name, shape, rows, moved, 0, lambda f=call: f(cpu)))
            cases.append(Case(f"{name}, torch", shape, rows, moved, 0, lambda f=call: f(reference)))
        cases.append(
            Case("quantize", "7168", rows, 3 * x.numel(), 0, lambda x=x: cpu.quantize_activation(x, FP4_SCALE))
        )
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--only", nargs="+", default=["products", "experts", "attention", "small", "threads"])
    parser.add_argument("--rows", nargs="+", type=int, help="of products, these only")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--path", choices=("avx512", "avx2_vnni", "avx2", "portable"), help="another instruction set")
    options = parser.parse_args()
    if not cpu.available():
        raise SystemExit("the native CPU kernels are not built; reinstall the package with a C++17 compiler and cmake")
    rows: list[Row] = []
    with torch.inference_mode(), cpu.use_path(options.path or cpu.path()):
        print(f"path {cpu.path()} of {', '.join(cpu.paths())}")
        for name in options.only:
            if name == "products":
                for shape in SHAPES:
                    cases = [case for case in products(shape) if not options.rows or case.rows in options.rows]
                    rows += run_group(cases, options.repeats, options.threads)
            elif name == "threads":
                cases = [case for case in products(SHAPES[0]) if case.operation == "w4a16" and case.rows in (1, 4, 512)]
                for threads in sorted({1, *(2**i for i in range(1, 8) if 2**i <= options.threads), options.threads}):
                    rows += run_group(cases, options.repeats, threads)
            else:
                cases = {"experts": experts, "attention": attention, "small": small}[name]()
                rows += run_group(cases, options.repeats, options.threads)
    if options.json:
        with open(options.json, "w") as file:
            json.dump([asdict(row) for row in rows], file, indent=1)


if __name__ == "__main__":
    main()
