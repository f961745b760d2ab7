"""What each rank reads of a checkpoint: its slices, each byte once."""

import itertools
import math
from collections import defaultdict

import pytest

from benchmarks.random_checkpoint import write_checkpoint as write_random
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.models.inventory import Role, weights
from deepseek_fp4_plugin.parallel.mesh import Mesh
from tests.ranks import MAPPINGS
from tests.tiny import CONFIG

WHOLE = {Role.NORM, Role.ROUTER, Role.MTP_PROJECTION}
WHOLE_PROJECTIONS = ("q_a_proj", "kv_a_proj_with_mqa")


@pytest.fixture
def folder(request, tiny_fp8, tiny_nvfp4):
    return {"fp8": tiny_fp8, "nvfp4": tiny_nvfp4}[request.param]


def read_by(folder, mesh: Mesh, monkeypatch) -> dict[str, list[tuple[int, int]]]:
    """The stretches of bytes that a rank reads of each tensor, counted from the shard's begin."""
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    fill = CheckpointReader._fill

    def counted(self, data, name, info, offset, pieces=1, stride=0):
        size = data.numel() // pieces if pieces else 0
        found[name] += [(offset + n * stride, offset + n * stride + size) for n in range(pieces)]
        fill(self, data, name, info, offset, pieces, stride)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointReader, "_fill", counted)
        DeepseekV3ForCausalLM.from_pretrained(folder, mesh=mesh, backend="reference")
    return found


def is_cut(weight, mesh: Mesh) -> bool:
    if weight.role is Role.ROUTED_EXPERT:
        return True
    return mesh.tp.count > 1 and weight.role not in WHOLE and not weight.module.endswith(WHOLE_PROJECTIONS)


@pytest.mark.parametrize("folder", ["fp8", "nvfp4"], indirect=True)
@pytest.mark.parametrize("mapping", ["TP2", "TP4/EP2", "DP4", "DP4/EP4"])
def test_ranks_read_their_slices_and_every_byte_once(folder, mapping, monkeypatch):
    ranks = [Mesh(rank, **MAPPINGS[mapping]) for rank in range(MAPPINGS[mapping]["tensor_parallel_size"])]
    reads = [read_by(folder, mesh, monkeypatch) for mesh in ranks]
    config = DeepseekV3Config.from_folder(folder)
    reader = CheckpointReader(folder)
    for read in reads:
        for name, stretches in read.items():
            ordered = sorted(stretches)
            assert all(one[1] <= other[0] for one, other in itertools.pairwise(ordered)), name
    duplicates = (
        f"model.layers.{config.num_hidden_layers}.embed_tokens",
        f"model.layers.{config.num_hidden_layers}.shared_head.head",
    )
    for weight in weights(config):
        own = [sum(stop - start for start, stop in read.get(weight.name, ())) for read in reads]
        if weight.module in duplicates:
            assert sum(own) == 0
        elif is_cut(weight, ranks[0]):
            assert sum(own) == reader.info(weight.name).nbytes, weight.name
            if weight.role is not Role.ROUTED_EXPERT:
                assert len(set(own)) == 1
        else:
            assert set(own) == {reader.info(weight.name).nbytes}
    for name, info in reader.tensors.items():  # no byte of any tensor is left unread, scales included
        covered, at = 0, -1
        for start, stop in sorted(stretch for read in reads for stretch in read.get(name, ())):
            covered, at = covered + max(0, stop - max(start, at)), max(at, stop)
        assert covered == (0 if name.removesuffix(".weight") in duplicates else info.nbytes), name


@pytest.mark.parametrize("folder", ["fp8", "nvfp4"], indirect=True)
def test_scales_are_read_where_their_weights_are(folder, monkeypatch):
    """A rank reads scales of the blocks that it holds a part of, and one number of the other ranks' experts at most."""
    config = DeepseekV3Config.from_folder(folder)
    mesh = Mesh(1, 4, moe_expert_parallel_size=2)
    read = read_by(folder, mesh, monkeypatch)
    reader = CheckpointReader(folder)
    local = range(*mesh.ep.bounds(config.n_routed_experts, "experts"))
    suffix = "weight_scale_inv" if "weight_scale_inv" in " ".join(reader) else "weight_scale"
    for expert in range(config.n_routed_experts):
        name = f"model.layers.1.mlp.experts.{expert}.down_proj.{suffix}"
        own = sum(stop - start for start, stop in read.get(name, ()))
        info = reader.info(name)
        columns = info.shape[1] / mesh.moe_tp.count  # FP8: half of the only block still needs its scale
        assert own == (info.shape[0] * math.ceil(columns) * info.dtype.itemsize if expert in local else 0)


def test_a_cut_through_an_nvfp4_block_is_refused(tmp_path):
    write_random(tmp_path / "model", {**CONFIG, "moe_intermediate_size": 48}, quantized=True)
    with pytest.raises(ValueError, match=r"experts\.0\.down_proj: 48 inputs cut 2 ways .* blocks of 16"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path / "model", mesh=Mesh(0, 2))
