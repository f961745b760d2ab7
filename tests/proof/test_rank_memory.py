"""What loading a rank's share costs in memory: R1's exact shapes and formats, with few layers and few experts."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.random_checkpoint import QUANTIZATION
from deepseek_fp4_plugin.checkpoint.writer import CheckpointWriter, TensorSpec
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.deepseek_r1 import CONFIG_JSON
from deepseek_fp4_plugin.models.inventory import Role, Weight, weights

pytestmark = pytest.mark.proof

LAYERS = {
    **CONFIG_JSON,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "rope_scaling": None,
    "num_nextn_predict_layers": 0,
}
MODULES = {Role.DENSE_MLP, Role.ROUTED_EXPERT, Role.SHARED_EXPERT}  # in NVFP4; the rest as published, BF16
_PROGRAM = """
import json, os, sys
import torch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.engine.worker import _held, _weight_bytes
from deepseek_fp4_plugin.parallel.mesh import Mesh

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

torch.set_num_threads(1)
DeepseekV3ForCausalLM.from_pretrained("r1_nano")
empty = peak()
model = DeepseekV3ForCausalLM.from_pretrained(sys.argv[1], mesh=Mesh(**json.loads(sys.argv[2])))
print(json.dumps([empty, peak(), _weight_bytes(list(_held(model)))]))
"""


def tensors(weight: Weight):
    """Any bytes will do: nothing is computed with them."""
    if weight.role not in MODULES:
        dtype = torch.float32 if weight.name.endswith("bias") else torch.bfloat16
        yield TensorSpec(weight.name, dtype, weight.shape)
        return
    out, width = weight.shape
    yield TensorSpec(weight.name, torch.uint8, (out, width // 2))
    yield TensorSpec(f"{weight.module}.weight_scale", torch.float8_e4m3fn, (out, width // 16))
    yield TensorSpec(f"{weight.module}.weight_scale_2", torch.float32, ())
    yield TensorSpec(f"{weight.module}.input_scale", torch.float32, ())


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shaped") / "r1"
    specs = [spec for weight in weights(DeepseekV3Config.from_dict(LAYERS)) for spec in tensors(weight)]
    writer = CheckpointWriter(folder, specs, {"kind": "test"}, 2 * 10**9)
    for spec in specs:
        writer.write(spec.name, torch.ones(spec.shape, dtype=torch.uint8).to(spec.dtype))
    section = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": QUANTIZATION}
    writer.finish({"config.json": json.dumps(LAYERS), "hf_quant_config.json": json.dumps(section)})
    return folder


@pytest.mark.parametrize(
    "sizes",
    [
        {"rank": 1, "tensor_parallel_size": 8},
        {"rank": 1, "tensor_parallel_size": 8, "moe_expert_parallel_size": 2},
        {"rank": 3, "tensor_parallel_size": 4, "moe_expert_parallel_size": 4},
        {"rank": 7, "tensor_parallel_size": 8, "enable_attention_dp": True},
    ],
    ids=str,
)
def test_a_rank_peaks_within_a_fifth_above_its_share(shaped, sizes):
    command = [sys.executable, "-c", _PROGRAM, str(shaped), json.dumps(sizes)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    empty, peak, share = json.loads(out.splitlines()[-1])
    print(f"{sizes}: share {share / 1e9:.3f} GB, peak above an empty process {(peak - empty) / share:.3f} of it")
    assert peak - empty < 1.2 * share
