"""NVFP4 tiles hold exactly the checkpoint's weights, read here as kernels read them; and the CUDA sources compile."""

import importlib.util
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels.cuda import compiler, cuts, dense, experts_wgmma, launcher, matvec, wgmma
from deepseek_fp4_plugin.kernels.cuda.routing import prepare_router
from deepseek_fp4_plugin.kernels.cuda.tiles import VALUE_SCALE, Tiles, pack
from deepseek_fp4_plugin.kernels.reference.linear import dequantized
from deepseek_fp4_plugin.kernels.weights import WeightTensors
from deepseek_fp4_plugin.numerics import fp8_block, nvfp4

PAIR = 0x81C081C0


def random_part(out: int, width: int, experts: int = 0) -> WeightTensors:
    lead = (experts,) if experts else ()
    packed = torch.randint(0, 256, (*lead, out, width // 2), dtype=torch.uint8)
    scale = torch.randint(0, 127, (*lead, out, width // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return WeightTensors(WeightFormat.NVFP4, packed, scale, torch.rand(lead) + 0.1)


def bf16_value(bits: torch.Tensor) -> torch.Tensor:
    return (bits & 0xFFFF).to(torch.uint16).view(torch.bfloat16).double()


def decoded_as_kernels_do(tiles: Tiles, expert: int) -> torch.Tensor:
    """FP32 [groups * 16, slabs * 128] in the tiles' order of outputs: source/nvfp4.cuh in torch."""
    data = tiles.data[expert]
    groups, slabs, _ = data.shape
    words = data[..., :1024].contiguous().view(torch.int32).view(groups, slabs, 2, 8, 4, 2, 2).long() & 0xFFFFFFFF
    scales = bf16_value(data[..., 1024:].view(groups, slabs, 8, 4, 2, 2).long() * 16 + 0x6E80)
    scales = scales.permute(0, 5, 2, 1, 4, 3)  # group, half, g, slab, tile, block
    values = torch.zeros(groups, 2, 8, slabs, 2, 4, 16)
    first, second = words.unbind(-1)
    both = (first & 0x06030603) | (second & 0xF9FCF9FC)
    turns = ((first, 0), (first, 4), (first, 10), (second, 2), (second, 8), (second, 14), (both, 6), (both, 12))
    for index, (word, turn) in enumerate(turns):
        bits = ((word << turn) | (word >> (32 - turn))) & PAIR
        for side in range(2):
            value = bf16_value(bits >> (16 * side)).permute(0, 5, 3, 1, 2, 4)
            values[..., 2 * index + side] = (value * scales * VALUE_SCALE).float()
    return values.reshape(groups * 16, slabs * 128)


@pytest.mark.parametrize(("out", "width"), [(1, 16), (16, 128), (7, 48), (130, 1040)])
def test_one_projection(out, width):
    part = random_part(out, width)
    tiles = pack([part])
    values = decoded_as_kernels_do(tiles, 0)
    assert torch.equal(values[:out, :width], nvfp4.block_values(part.weight, part.scale))
    assert not values[out:].any() and not values[:, width:].any()
    assert torch.equal(tiles.row_scale[0, :out], (part.scale_2 * VALUE_SCALE).expand(out))
    assert tiles.data.numel() == -(-out // 16) * -(-width // 128) * 1152


@pytest.mark.parametrize("half", [8, 12, 128])
def test_gate_and_up_of_experts_take_turns(half):
    gate, up = random_part(half, 144, 3), random_part(half, 144, 3)
    tiles = pack([gate, up])
    for expert in range(3):
        values = decoded_as_kernels_do(tiles, expert).view(-1, 2, 8, tiles.slabs * 128)
        scale = tiles.row_scale[expert].view(-1, 2, 8)
        for index, part in enumerate((gate, up)):
            own = values[:, index].reshape(-1, tiles.slabs * 128)
            assert torch.equal(own[:half, :144], nvfp4.block_values(part.weight[expert], part.scale[expert]))
            assert torch.equal(scale[:, index].flatten()[:half], (part.scale_2[expert] * VALUE_SCALE).expand(half))


def test_every_scale_and_code():
    packed = torch.arange(256, dtype=torch.uint8).repeat(127, 1)
    scale = torch.arange(127, dtype=torch.uint8).unsqueeze(1).repeat(1, 32).view(torch.float8_e4m3fn)
    tiles = pack([WeightTensors(WeightFormat.NVFP4, packed, scale, torch.tensor(1.0))])
    assert torch.equal(decoded_as_kernels_do(tiles, 0)[:127], nvfp4.block_values(packed, scale))


def test_what_tiles_cannot_hold():
    part = random_part(16, 32)
    part.scale.view(torch.uint8)[3, 1] = 0x80 + 56
    with pytest.raises(ValueError, match="negative"):
        pack([part])
    with pytest.raises(ValueError, match="does not fit"):
        pack([WeightTensors(WeightFormat.NVFP4, part.weight, part.scale[:, :1], part.scale_2)])


def test_a_router_s_weight_is_the_sum_of_the_fewest_parts():
    weight = torch.randn(12, 40)
    for values, count in ((weight, 3), (weight.bfloat16().float(), 1), (torch.zeros(12, 40), 1)):
        parts = prepare_router(values).parts
        assert parts.shape == (count, 12, 40) and parts.dtype is torch.bfloat16
        assert torch.equal(parts.double().sum(0), values.double())


VARIANTS = [
    ("nvfp4_linear.cu", {"ROWS8": 1, "GROUPS": 2, "GATED": 1}),
    ("nvfp4_linear.cu", {"ROWS8": 8, "GROUPS": 2, "GATED": 0}),
    (
        "nvfp4_matvec.cu",
        {"ROWS8": 1, "GROUPS": 2, "WARPS": 8, "STAGES": 3, "DEPTH": 2, "MIN_BLOCKS": 3, "GATED": 0, "EXPERTS": 0},
    ),
    (
        "nvfp4_matvec.cu",
        {"ROWS8": 1, "GROUPS": 1, "WARPS": 8, "STAGES": 5, "DEPTH": 4, "MIN_BLOCKS": 2, "GATED": 1, "EXPERTS": 1},
    ),
    ("nvfp4_experts_down.cu", {"GROUPS": 2, "WARPS": 8, "MIN_BLOCKS": 3}),
    ("router.cu", {"SLOTS": 8}),
    ("router.cu", {"SLOTS": 1}),
    ("combine.cu", {}),
    ("experts_work.cu", {}),
    (
        "nvfp4_experts.cu",
        {"ROWS8": 2, "GROUPS": 4, "GATED": 1, "HELD": 0, "RING": 8, "WARPS": 8, "BLOCKS": 2, "EARLY": 0},
    ),
    (
        "nvfp4_experts.cu",
        {"ROWS8": 4, "GROUPS": 2, "GATED": 0, "HELD": 8, "RING": 8, "WARPS": 8, "BLOCKS": 1, "EARLY": 1},
    ),
    *(
        ("nvfp4_experts_wgmma.cu", dict(experts_wgmma._defines(cut, gated, columns)))
        for cut in (*experts_wgmma.MEASURED.values(), experts_wgmma.FP8)
        for columns in cut.columns[:1]
        for gated in (False, True)
    ),
    ("nvfp4_experts_wgmma.cu", dict(experts_wgmma._defines(experts_wgmma.MEASURED[math.inf], True, 112))),
    ("mla_decode.cu", {"LATENT": 512, "ROPE": 64, "TILES": 2, "FP8": 0, "CLUSTER": 2}),
    ("mla_decode.cu", {"LATENT": 128, "ROPE": 32, "TILES": 1, "FP8": 1, "CLUSTER": 1}),
    ("mla_merge.cu", {"LATENT": 512, "ROPE": 64, "CLUSTER": 2}),
    ("mla_wgmma.cu", {"LATENT": 512, "ROPE": 64, "FP8": 0}),
    ("mla_wgmma.cu", {"LATENT": 512, "ROPE": 64, "FP8": 1}),
    ("small.cu", {}),
    ("per_head.cu", {}),
    ("nvfp4_decode.cu", {"TURNS": 4, "FP8": 0}),
    ("nvfp4_decode.cu", {"TURNS": 1, "FP8": 1}),
    ("fp8_rows.cu", {}),
    ("nvfp4_wgmma.cu", {"ROWS": 152, "OUTS": 2, "WARPS": 8, "STAGES": 3, "MIN_BLOCKS": 1, "GATED": 1, "EVEN": 0}),
    ("nvfp4_wgmma.cu", {"ROWS": 208, "OUTS": 1, "WARPS": 8, "STAGES": 3, "MIN_BLOCKS": 1, "GATED": 0, "EVEN": 1}),
    ("nvfp4_wgmma.cu", {"ROWS": 128, "OUTS": 2, "WARPS": 8, "STAGES": 4, "MIN_BLOCKS": 1, "GATED": 0, "EVEN": 0}),
    ("nvfp4_wgmma.cu", {"ROWS": 56, "OUTS": 2, "WARPS": 8, "STAGES": 6, "MIN_BLOCKS": 1, "GATED": 0, "EVEN": 1}),
    *(
        ("nvfp4_wgmma.cu", dict(wgmma._defines(cuts.on_hopper(448, 144, rows), gated=True)))
        for rows in (16, 24, 32, 40, 48, 56)
    ),
    ("dense_linear.cu", {"ROWS8": 1, "GROUPS": 1, "STAGES": 6, "FP8": 0, "AHEAD": 4, "NORM": 0, "PACE": 1}),
    ("dense_linear.cu", {"ROWS8": 1, "GROUPS": 1, "STAGES": 4, "FP8": 0, "AHEAD": 4, "NORM": 1, "PACE": 0}),
    ("dense_linear.cu", {"ROWS8": 2, "GROUPS": 1, "STAGES": 4, "FP8": 1, "AHEAD": 1, "NORM": 0, "PACE": 0}),
]


@pytest.mark.skipif(not launcher.available(), reason="cuda-bindings and nvidia-cuda-nvrtc are not installed")
@pytest.mark.parametrize(("file", "defines"), VARIANTS, ids=lambda value: str(value))
@pytest.mark.parametrize("architecture", ["sm_90a", "sm_100a"])
def test_sources_compile(tmp_path, monkeypatch, file, defines, architecture):
    if "wgmma" in file and architecture != "sm_90a":
        pytest.skip("wgmma is Hopper's alone")
    logs, compile_ = [], compiler._compile

    def kept_log(*arguments):
        code, log = compile_(*arguments)
        logs.append(log)
        return code, log

    monkeypatch.setattr(compiler, "_compile", kept_log)
    code = compiler.cubin(file, tuple(defines.items()), architecture, tmp_path)
    assert "serialized" not in logs[0]  # each product waiting for the one before
    assert code[:4] == b"\x7fELF"
    (kept,) = tmp_path.iterdir()
    assert kept.read_bytes() == code == compiler.cubin(file, tuple(defines.items()), architecture, tmp_path)


@pytest.mark.skipif(not launcher.available(), reason="cuda-bindings and nvidia-cuda-nvrtc are not installed")
def test_a_source_that_does_not_compile_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken.cu").write_text("int x = nothing;")
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)
    with pytest.raises(RuntimeError, match=r"broken\.cu does not compile(.|\n)*nothing"):
        compiler.cubin("broken.cu", (), "sm_90a", tmp_path)


def test_the_benchmark_s_shapes_have_cuts():
    """Its dry mode asserts that each fits a block."""
    script = Path(__file__).parents[2] / "benchmarks" / "cuda_kernels.py"
    result = subprocess.run([sys.executable, script, "--dry"], capture_output=True, text=True, check=True)
    assert "dense down 7168 x 18432, 8 rows: Cut(groups=2, warps=8" in result.stdout
    assert "dense down 7168 x 18432, 64 rows: Cut(rows=64" in result.stdout
    assert "o_proj 7168 x 16384, 1024 rows: Cut(rows=256, outs=1, warps=8, stages=3, cluster=0)" in result.stdout
    assert "o_proj 7168 x 16384, 8192 rows: decoded once" in result.stdout
    assert "shared down of TP8 7168 x 256, 8192 rows: decoded once" in result.stdout
    assert "experts of TP8/EP2, 64 tokens: Residence(columns=2, blocks=2), teams of [8, 1] warps" in result.stdout


def test_cuts_of_other_shapes():
    """Every cut fits a block, whatever the shape; no cluster has more blocks than there are slabs to share."""
    for groups, slabs in itertools.product((1, 16, 48, 300, 5000), (1, 2, 7, 56, 200)):
        for rows in (9, 16, 17, 100, 1000, 10000):
            cut = cuts.on_hopper(groups, slabs, rows)
            assert cut is None or (cut.shared <= launcher.MAX_SHARED and cuts.EVEN <= cut.cluster <= slabs)
        for rows, fp8 in itertools.product((1, 8, 9, 16), (False, True)):
            own = dense.geometry(16 * groups, 128 * slabs, rows, fp8)
            assert own.shared <= launcher.MAX_SHARED and 1 <= own.blocks <= groups
            assert own.warps * own.cluster <= max(2, slabs)
        for rows in (0, 1, 8, 9):
            few = matvec.choose(groups, slabs, rows)
            assert (few is None) == (rows in (0, 9) or slabs < 8)
            if few:
                assert few.resident * few.shared <= launcher.MAX_SHARED
                assert few.warps * few.cluster <= slabs and 1 <= few.blocks <= -(-groups // few.groups)


def test_what_is_built_ahead_is_what_is_chosen(monkeypatch):
    monkeypatch.setattr(cuts, "choose", lambda device, *product: cuts.on_hopper(*product))
    for groups, slabs in ((32, 56), (448, 2), (288, 56), (448, 128), (100, 30)):
        built = cuts.up_to(0, groups, slabs, 2000)
        chosen = [cuts.on_hopper(groups, slabs, rows) for rows in range(9, 2001)]
        assert built <= set(chosen) and 1 < len(built) < 50
        assert sum(cut is not None and cut not in built for cut in chosen) < 20


@pytest.mark.parametrize("processors", [78, 114, 132])
@pytest.mark.parametrize(
    "shape", [(448, 64), (448, 32), (576, 56), (1152, 56), (384, 56), (512, 56), (448, 36)], ids=str
)
def test_other_shapes_and_gpus_fill_their_waves(shape, processors):
    """Those of TP2 and TP4: what was measured fits R1's TP8 and 132 multiprocessors alone."""
    for rows in range(136, 1025, 8):
        cut = cuts.on_hopper(*shape, rows, processors)
        if cut is not None:
            best = min(cuts.estimate(other, *shape, rows, processors) for other in cuts.estimated(shape[1]))
            assert cuts.estimate(cut, *shape, rows, processors) <= 1.01 * best, rows


def test_times_of_slabs_shared_evenly():
    """As a multiprocessor has them that has the most, product by product."""
    cut, processors = cuts.Cut(128, 2, 8, 4, cuts.EVEN), 132
    for groups, slabs, rows in itertools.product((16, 288, 448, 2304), (2, 16, 56, 144), (100, 300, 700, 3000)):
        products = -(-groups // 16) * -(-rows // 128)
        whole = max(0, products // processors - 1)  # of each multiprocessor, then the rest evenly
        rest = (products - whole * processors) * slabs
        bounds = [rest * block // processors for block in range(processors + 1)]
        counts = cuts.times(cut, groups, slabs, rows, processors)
        assert counts.slabs == whole * slabs + max(high - low for low, high in itertools.pairwise(bounds))
        touched = max(-(-high // slabs) - low // slabs for low, high in itertools.pairwise(bounds))
        assert touched <= counts.blocks - whole <= touched + 1
        assert (counts.parts == 0) == all(bound % slabs == 0 for bound in bounds)


def test_costs_of_cuts_are_found_in_their_times():
    """The benchmark's fit, on times made of other costs, some of them far off."""
    spec = importlib.util.spec_from_file_location(
        "cuda_cuts", Path(__file__).parents[2] / "benchmarks" / "cuda_cuts.py"
    )
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    torch.manual_seed(0)
    kinds = {kind: (1.1 * slab, block + 1) for kind, (slab, block) in cuts.COSTS.items()}
    launch, *others = shared = 2.0, 3e-3, 1e-3, 1.0
    lines = []
    for groups, slabs in ((256, 56), (448, 144), (448, 16)):
        for rows in range(96, 2000, 96):
            line = {}
            for cut in cuts.estimated(slabs):
                counts = cuts.times(cut, groups, slabs, rows, cuts.FITTED)
                slab, block = kinds[cut[:3]]
                costs = slab, block, *others
                us = launch + sum(count * cost for count, cost in zip(counts, costs, strict=True))
                noise = 1.5 if torch.rand(()) < 0.02 else 1 + 0.01 * float(torch.randn(()))
                line[" ".join(map(str, cut))] = us * noise
            lines.append(
                {
                    "shape": f"{16 * groups}x{128 * slabs}",
                    "rows": rows,
                    "multiprocessors": 132,
                    "microseconds": line | {"torch": 1.0},
                }
            )
    found, fitted = benchmark.fit(lines)
    assert found.keys() == kinds.keys()
    for kind, (slab, block) in kinds.items():
        assert found[kind] == (pytest.approx(slab, rel=0.02), pytest.approx(block, abs=0.5)), kind
    assert fitted.tolist() == pytest.approx(shared, rel=0.3)


def test_fp8_blocks_of_fused_parts():
    """Parts whose outputs or blocks do not line up get blocks that fit both."""
    width = 65536
    gate, up = (
        WeightTensors(
            WeightFormat.FP8_BLOCK,
            torch.randn(out, width).to(torch.float8_e4m3fn),
            torch.rand(-(-out // rows), width // columns),
            fp8_block=(rows, columns),
        )
        for out, rows, columns in ((96, 128, 128), (40, 32, 64))
    )
    assert dense.fp8_blocks([up]) is None  # too small to be worth it
    blocks = dense.fp8_blocks([gate, up])
    assert (blocks.rows, blocks.columns) == (32, 64)
    values = fp8_block.dequantize(blocks.weight, blocks.scale, torch.float32, (blocks.rows, blocks.columns))
    assert torch.equal(values, torch.cat([dequantized(part) for part in (gate, up)]))


def test_the_whole_model_s_steps_fit():
    """The dry mode of benchmarks/shard.py computes R1's exact shapes: dense and expert layers, the MTP module."""
    script = Path(__file__).parents[2] / "benchmarks" / "shard.py"
    arguments = ["--dry", "--layers", "4", "--batch", "1", "128", "--context", "1024"]
    result = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True)
    cells = result.stdout.splitlines()
    assert len(cells) == 18 and all("shapes fit" in cell for cell in cells)
    assert any(cell.startswith("ep8dp   prefill batch 1    context 8192   drafts 3") for cell in cells)


@pytest.mark.skipif(not launcher.available(), reason="cuda-bindings and nvidia-cuda-nvrtc are not installed")
def test_a_log_of_nothing_leaves_the_interpreter_s_bytes_alone(tmp_path):
    """CPython has one copy of each single byte, into which the bindings would write (if no .pyc holds the constant)."""
    script = (
        "import sys, pathlib; from deepseek_fp4_plugin.kernels.cuda import compiler\n"
        "compiler.cubin('fp8_rows.cu', (), 'sm_90a', pathlib.Path(sys.argv[1])); assert bytes([32])[0] == 32"
    )
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path / "none")}
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True, env=environment)
