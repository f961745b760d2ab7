"""Every CUDA kernel on small, odd shapes under NVIDIA's compute-sanitizer: memory faults, and races in shared memory.

    python benchmarks/cuda_sanitizer.py [--tool memcheck racecheck] [--program compute-sanitizer]

Needs a GPU and the compute-sanitizer of a CUDA toolkit. Ends with status 1 where the tool reports an error.
"""

import argparse
import subprocess
import sys

import torch

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import cuda, ops
from deepseek_fp4_plugin.kernels.cuda import cuts, experts_wgmma, fp8, wgmma
from deepseek_fp4_plugin.kernels.cuda.attention import Cut, launch, on_matrix_unit
from deepseek_fp4_plugin.kernels.cuda.decode import decode
from deepseek_fp4_plugin.kernels.weights import PreparedWeight, WeightTensors

BF16, DEVICE = torch.bfloat16, torch.device("cuda")
# Contexts, queries of each, heads, widths: by two kernels, several blocks of rows in the last case.
ATTENTION = (
    ((70, 300), 1, 16, 512, 64),
    ((70, 300), 2, 16, 512, 64),
    ((640,), 4, 16, 128, 32),
    ((70, 520), 4, 20, 512, 64),
)


def prepared(*sizes: int, parts: int = 1) -> PreparedWeight:
    """sizes: (experts,) out, in."""
    *lead, out, width = sizes
    made = []
    for _ in range(parts):
        packed = torch.randint(0, 256, (*lead, out, width // 2), dtype=torch.uint8)
        scale = torch.randint(40, 90, (*lead, out, width // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
        made.append(WeightTensors(WeightFormat.NVFP4, packed, scale, torch.full(lead, 1e-2)))
    weight = ops.prepare(made, DEVICE, BF16)
    assert weight.backend is cuda
    return weight


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, BF16)


def products() -> None:
    for out, width, rows in (
        (48, 256, 3),
        (144, 1040, 9),
        (512, 2048, 1),
        (256, 7168, 20),
        (64, 512, 70),
        (96, 144, 200),
    ):
        for parts in (1, 2):
            ops.linear(values(rows, width), prepared(out, width, parts=parts))
        ops.gated_mlp(values(rows, width), prepared(out, width, parts=2), prepared(width, out))
        # Not the product between them, which is the library's.
        fp8.round_rows(values(rows, width))
        decode(prepared(out, width, parts=2).data, 0, 2 * out, width, torch.empty(1, 2 * out, device=DEVICE))
    if experts_wgmma.available(0):
        large, x, y = prepared(264, 528), values(153, 528), torch.empty(153, 264, device=DEVICE, dtype=BF16)
        for kind in (
            (24, 1, 4, 8, 3),
            (56, 2, 8, 6, 1),
            (80, 2, 8, 5, 1),
            (136, 1, 12, 4, 1),
            (152, 2, 8, 3, 1),
            (168, 1, 8, 4, 2),
            (192, 1, 8, 3, 2),
            (256, 1, 8, 3, 1),
        ):
            cut = cuts.Cut(*kind)
            wgmma.launch(x, large.data, 0, y, 264, False, cut)
        # So many products that blocks have some of their own, and the rest in parts.
        large, y = prepared(4096, 512, parts=2), torch.empty(1200, 8192, device=DEVICE, dtype=BF16)
        for rows, gated in ((700, False), (1200, True)):
            wgmma.launch(values(rows, 512), large.data, 0, y[:rows], 8192, gated, cuts.Cut(144, 1, 8, 4, cuts.EVEN))


def dense() -> None:
    """BF16 and FP8 weights; a sum shared by a cluster's blocks, a ring filled at a pace, a product of several turns."""
    for out, width, rows in (
        (1, 16, 1),
        (130, 1040, 9),
        (576, 2048, 16),
        (1200, 7168, 3),
        (2112, 2048, 3),
        (5000, 512, 3),
    ):
        plain = values(out, width)
        scale = torch.rand(-(-out // 128), -(-width // 128))
        for part in (
            WeightTensors(WeightFormat.PLAIN, plain),
            WeightTensors(WeightFormat.FP8_BLOCK, plain.to(torch.float8_e4m3fn), scale),
        ):
            weight = ops.prepare([part], DEVICE, BF16)
            ops.linear(values(rows, width), weight)
            ops.norm_linear(values(rows, width), values(width), 1e-6, weight)
            ops.linear_pair(values(rows, width), weight, weight)


def experts() -> None:
    """A few tokens, lists with one and with several columns of rows, and all decoded at once."""
    for count, hidden, inner, k in ((8, 512, 256, 4), (4, 272, 144, 2), (6, 2304, 640, 2)):
        gate_up, down = prepared(count, inner, hidden, parts=2), prepared(count, hidden, inner)
        for tokens in (1, 12, 100, 2100):
            ids = torch.stack([torch.randperm(count)[:k] for _ in range(tokens)])
            ids[0, 1] = -1
            weights = torch.rand(tokens, k)
            arguments = values(tokens, hidden), ids.to(DEVICE), weights.to(DEVICE), gate_up, down
            ops.experts_mlp(*arguments)
            if experts_wgmma.available(0):
                for cut in (*experts_wgmma.MEASURED.values(), experts_wgmma.FP8):
                    if cut.launches or tokens <= 100:  # whatever so many tokens would take
                        experts_wgmma.by_blocks(*arguments, cut)


def attention() -> None:
    for dtype in (BF16, torch.float8_e4m3fn):
        for contexts, query, heads, latent, rope in ATTENTION:
            requests, blocks = len(contexts), 20
            q = values(requests * query, heads, latent + rope)
            cache = values(requests * blocks, 32, latent + rope).to(dtype)
            tables = torch.randperm(requests * blocks, device=DEVICE).view(requests, blocks)
            starts = torch.arange(requests + 1, device=DEVICE) * query
            lengths = torch.tensor(contexts, device=DEVICE)
            latents, rotated = q[..., :latent], q[..., latent:]
            bounds = query, max(contexts), 0.1
            ops.absorbed_attention(latents, rotated, cache, tables, starts, lengths, *bounds)
            # By themselves contexts as short as these are cut into chunks: here blocks have several, in turn.
            cuts = [Cut(1, 1), Cut(2, 2)]
            if on_matrix_unit(latent, rope, 0):
                cuts += [Cut(1, 1, True), Cut(2, 1, True)]
            for cut in cuts:
                launch(latents, rotated, cache, tables, starts, lengths, *bounds, cut)
        entries = values(3, 160)
        ops.store_entries(
            torch.zeros(2, 8, 160, device=DEVICE).to(dtype), torch.tensor([3, 9, 1], device=DEVICE), entries
        )
    kv_b = ops.prepare([WeightTensors(WeightFormat.PLAIN, values(4 * 80, 128))], DEVICE, BF16)
    q, angle = values(3, 4, 64), torch.randn(3, 16, device=DEVICE)
    q_latent, _ = ops.absorbed_queries(q[..., :32], q[..., 32:], kv_b, angle, angle)
    ops.values_from_latent(q_latent, kv_b, 48)
    one = torch.tensor([[3, 0, 2]], device=DEVICE), torch.arange(2, device=DEVICE), torch.tensor([70], device=DEVICE)
    ops.attended_values(q_latent[:1], q[:1, :, 32:], values(4, 32, 160), *one, 1, 200, 0.1, kv_b, 48)
    for dtype in (BF16, torch.float8_e4m3fn):
        cache, slots = torch.zeros(2, 8, 160, device=DEVICE).to(dtype), torch.tensor([3, 9, 1], device=DEVICE)
        latents = cache, slots, values(3, 160), values(128), 1e-6
        ops.absorb_and_store(q[..., :32], q[..., 32:], kv_b, angle, angle, *latents)


def small() -> None:
    x, angle = values(3, 256), torch.randn(3, 16, device=DEVICE)
    ops.rms_norm(x, values(256), 1e-6)
    for weight in (torch.randn(32, 256, device=DEVICE), values(32, 256).float()):
        router = ops.prepare_router(weight, torch.zeros(32, device=DEVICE), BF16)
        for rows in (3, 40, 70, 600):
            ids, _ = ops.router(values(rows, 256), router, 4, 8, 4, True, 1.0)
            ops.local_ids(ids, torch.arange(32, device=DEVICE))
            ops.placed_router(values(rows, 256), router, torch.arange(32, device=DEVICE), 4, 8, 4, True, 1.0)
    for rows in (1, 3):
        ops.add_rms_norm(*(values(rows, 7168) for _ in range(2)), values(7168), 1e-6, values(rows, 7168))
    ops.rotary(values(3, 4, 32), angle, angle)
    for dtype in (BF16, torch.float8_e4m3fn):
        cache, slots = torch.zeros(2, 8, 160, device=DEVICE).to(dtype), torch.tensor([3, 9, 1], device=DEVICE)
        ops.store_latents(cache, slots, values(3, 160), values(128), 1e-6, angle, angle)
    ops.argmax(values(3, 4096))
    starts, tables = torch.tensor([3, 70], device=DEVICE), torch.randperm(10, device=DEVICE).view(2, 5)
    ops.step_inputs(torch.tensor([1, 0], device=DEVICE), starts, torch.zeros_like(tables)[:, :3], tables, 4, 32)
    ops.cos_sin(starts, torch.rand(16, device=DEVICE), 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", nargs="+", default=["memcheck", "racecheck"])
    parser.add_argument("--program", default="compute-sanitizer")
    parser.add_argument("--run", action="store_true", help="the kernels alone, as the tool runs them")
    options = parser.parse_args()
    if options.run:
        torch.manual_seed(0)
        with torch.inference_mode():
            for group in (products, dense, experts, attention, small):
                group()
                torch.cuda.synchronize()
                print(f"{group.__name__}: done", flush=True)
        return
    codes = []
    for tool in options.tool:
        print(tool, flush=True)
        # Bindings ask the driver for names that it may lack: no error of a kernel.
        command = [options.program, "--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no"]
        command += [sys.executable, __file__, "--run"]
        codes.append(subprocess.run(command, check=False).returncode)
    raise SystemExit(1 if any(codes) else 0)


if __name__ == "__main__":
    main()
