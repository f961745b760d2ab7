"""RMSNorm."""

from torch import Tensor, nn

from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.layers.weight_source import WeightSource


class RMSNorm(nn.Module):
    weight: Tensor

    def __init__(self, name: str, size: int, eps: float):
        super().__init__()
        self.name, self.size, self.eps = name, size, eps

    def load(self, source: WeightSource) -> None:
        self.weight = source.tensor(f"{self.name}.weight", (self.size,))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)
