"""Gated SiLU MLP: the dense layers, and the shared expert."""

import torch
from torch import Tensor, nn

from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.layers.linear import Linear, row_parallel
from deepseek_fp4_plugin.layers.weight_source import OUT, Cut, WeightSource
from deepseek_fp4_plugin.parallel.mesh import Mesh


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x), gate and up fused. Output is a partial sum over the tensor-parallel ranks."""

    def __init__(self, name: str, hidden_size: int, intermediate_size: int, mesh: Mesh):
        super().__init__()
        cut = Cut(OUT, mesh.tp)
        self.gate_up_proj = Linear([f"{name}.gate_proj", f"{name}.up_proj"], hidden_size, [intermediate_size] * 2, cut)
        self.down_proj = row_parallel(f"{name}.down_proj", intermediate_size, hidden_size, mesh.tp)

    def load(self, source: WeightSource) -> None:
        self.gate_up_proj.load(source)
        self.down_proj.load(source)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.gate_up_proj.observer or self.down_proj.observer):
            return ops.gated_mlp(x, self.gate_up_proj.weight, self.down_proj.weight)
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(torch.nn.functional.silu(gate) * up)
