"""Linear: y = x W^T in whatever format the checkpoint holds, whole or cut over ranks, one projection or fused."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.kernels.weights import PreparedWeight
from deepseek_fp4_plugin.layers.norm import RMSNorm
from deepseek_fp4_plugin.layers.weight_source import IN, OUT, UNCUT, Cut, WeightSource
from deepseek_fp4_plugin.parallel.mesh import Shard

Observer = Callable[[Tensor], None]


class Linear(nn.Module):
    """One projection, or several with the same input whose outputs are concatenated (gate and up).

    modules: full Hugging Face names, without `.weight`.  observer: sees every input [rows, in]; for calibration.
    """

    weight: PreparedWeight

    def __init__(self, modules: Sequence[str], in_features: int, out_features: Sequence[int], cut: Cut = UNCUT):
        super().__init__()
        self.modules_named = tuple(modules)
        self.in_features = in_features
        self.out_features = tuple(out_features)
        self.cut = cut
        self.observer: Observer | None = None

    def load(self, source: WeightSource) -> None:
        self.weight = source.linear(self.modules_named, self.out_features, self.in_features, self.cut)

    def forward(self, x: Tensor) -> Tensor:
        if self.observer:
            self.observer(x)
        return ops.linear(x, self.weight)

    def of_norm(self, norm: RMSNorm, x: Tensor) -> Tensor:
        """Of the norm of x, which comes before it and nothing else."""
        return self(norm(x)) if self.observer else ops.norm_linear(x, norm.weight, norm.eps, self.weight)


def column_parallel(name: str, in_features: int, out_features: int, shard: Shard) -> Linear:
    """Outputs cut over ranks."""
    return Linear([name], in_features, [out_features], Cut(OUT, shard))


def row_parallel(name: str, in_features: int, out_features: int, shard: Shard) -> Linear:
    """Inputs cut over ranks; the ranks' outputs are partial sums."""
    return Linear([name], in_features, [out_features], Cut(IN, shard))
