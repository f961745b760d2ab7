"""The byte ledger against R1's batch-1 budget worked out by hand, and against what r1_nano's files hold."""

import math

import pytest

from deepseek_fp4_plugin.checkpoint.hub import resolve
from deepseek_fp4_plugin.checkpoint.quant_config import SUFFIXES, WeightFormat, detect_format
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.deepseek_r1 import DEEPSEEK_R1
from deepseek_fp4_plugin.models.inventory import Role, weights
from deepseek_fp4_plugin.models.ledger import CACHE, Step, decode_step, expected_share, rank_bytes, seconds
from deepseek_fp4_plugin.parallel.mesh import Mesh
from deepseek_fp4_plugin.quantization.plan import becomes_nvfp4
from deepseek_fp4_plugin.quantization.report import planned_sizes


def published(layout):
    return lambda weight: WeightFormat.NVFP4 if becomes_nvfp4(weight, DEEPSEEK_R1, layout) else WeightFormat.PLAIN


def test_batch_one_of_r1():
    """38.5 GB a token: attention 22.8, routed experts 11.5, shared 1.4, dense 0.7, head 1.9, router 0.2; v2 28.2 GB."""
    lines = {line.role: line for line in decode_step(DEEPSEEK_R1, published("v1"), Step(context=0))}
    gigabytes = {role: round(line.bytes / 1e9, 1) for role, line in lines.items()}
    assert gigabytes[Role.ATTENTION] == 22.8 and gigabytes[Role.ROUTED_EXPERT] == 11.5
    assert gigabytes[Role.SHARED_EXPERT] == 1.4 and gigabytes[Role.DENSE_MLP] == 0.7
    assert gigabytes[Role.HEAD] == 1.9 and gigabytes[Role.ROUTER] == 0.2
    assert round(sum(line.bytes for line in lines.values()) / 1e9, 1) == 38.5
    v2 = decode_step(DEEPSEEK_R1, published("v2"), Step(context=0))
    assert round(sum(line.bytes for line in v2) / 1e9, 1) == 28.2


def test_what_eight_ranks_read_is_the_whole_and_what_each_has_whole():
    whole = {line.role: line for line in decode_step(DEEPSEEK_R1, published("v1"), Step(4, 2, 1000))}
    for mesh in (Mesh(0, 8), Mesh(0, 8, 2), Mesh(0, 8, 8, enable_attention_dp=True)):
        for line in decode_step(DEEPSEEK_R1, published("v1"), Step(4, 2, 1000), mesh):
            if line.role in (Role.ROUTED_EXPERT,):
                assert math.isclose(8 * line.bytes, whole[line.role].bytes)
            elif mesh.tp.count == 8 and line.role in (Role.SHARED_EXPERT, Role.DENSE_MLP, Role.HEAD):
                assert math.isclose(8 * line.bytes, whole[line.role].bytes)
                assert math.isclose(8 * line.flops, whole[line.role].flops)
            elif line.role is not Role.ATTENTION and line.role != CACHE:
                assert line.bytes == whole[line.role].bytes


def test_the_cache():
    """R1 caches 576 values a token and layer; 128 heads compute 2 * 1088 * 128 products for each."""
    cache = next(line for line in decode_step(DEEPSEEK_R1, published("v1"), Step(3, 2, 1000, 1)) if line.role == CACHE)
    assert cache.bytes == 61 * 576 * (3 * 1000 + 6)
    assert cache.flops == 61 * 2 * 128 * 1088 * 6 * 1000


def test_experts_hit():
    assert expected_share(DEEPSEEK_R1, 1) * 256 == 8
    assert abs(expected_share(DEEPSEEK_R1, 4) * 256 - 30.5) < 0.1  # 30.4 counted over draws
    assert abs(expected_share(DEEPSEEK_R1, 64) * 256 - 222.4) < 0.1
    for tokens in (1, 64, 4096):
        lines = decode_step(DEEPSEEK_R1, published("v1"), Step(tokens))
        line = next(line for line in lines if line.role is Role.ROUTED_EXPERT)
        assert math.isclose(line.flops, tokens * 58 * 8 * 3 * 2 * 7168 * 2048)


def test_seconds_is_the_larger_of_reading_and_computing():
    lines = decode_step(DEEPSEEK_R1, published("v1"), Step(context=1024))
    total = sum(line.bytes for line in lines)
    assert seconds(lines, 1e12, math.inf) == pytest.approx(total / 1e12)
    assert seconds(lines, math.inf, 1e12) == pytest.approx(sum(line.flops for line in lines) / 1e12)


def test_held_bytes_are_the_planned_checkpoint():
    for layout in ("v1", "v2"):
        held = sum(rank_bytes(DEEPSEEK_R1, published(layout)).values())
        assert abs(held / planned_sizes(DEEPSEEK_R1, layout).after - 1) < 1e-5  # single numbers are not counted


def test_held_bytes_are_what_the_embedded_files_hold():
    folder = resolve("r1_nano")
    config, reader = DeepseekV3Config.from_folder(folder), CheckpointReader(folder)
    formats = {w.name: detect_format(reader, w.module) for w in weights(config) if w.name.endswith(".weight")}
    held = rank_bytes(config, lambda weight: formats.get(weight.name, WeightFormat.PLAIN))
    stored = {role: 0.0 for role in held}
    for weight in weights(config):
        names = (
            [f"{weight.module}.{suffix}" for suffix in SUFFIXES[formats[weight.name]]]
            if weight.name in formats
            else [weight.name]
        )
        for name in names:
            info = reader.info(name)
            stored[weight.role] += math.prod(info.shape) * info.dtype.itemsize
    assert held == stored
