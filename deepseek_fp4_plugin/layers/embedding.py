"""Vocabulary at the model's two ends, cut by rows over the tensor-parallel ranks."""

import torch
from torch import Tensor, nn

from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.layers.weight_source import OUT, Cut, WeightSource
from deepseek_fp4_plugin.parallel.mesh import Mesh


class VocabEmbedding(nn.Module):
    """Token ids to rows; a rank returns zeros for tokens whose rows it does not hold, so partial outputs add up."""

    weight: Tensor

    def __init__(self, name: str, vocab_size: int, hidden_size: int, mesh: Mesh):
        super().__init__()
        self.name, self.shape, self.mesh = name, (vocab_size, hidden_size), mesh

    def load(self, source: WeightSource) -> None:
        self.weight = source.tensor(f"{self.name}.weight", self.shape, cut=Cut(OUT, self.mesh.tp))

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [T] to [T, hidden]."""
        if self.mesh.tp.count == 1:
            return ops.embedding(input_ids, self.weight)
        start, stop = self.mesh.tp.bounds(self.shape[0], self.name)
        here = (input_ids >= start) & (input_ids < stop)
        rows = ops.embedding(torch.where(here, input_ids - start, 0), self.weight)
        return self.mesh.reduce_attention(rows * here.unsqueeze(-1))


class LanguageModelHead(nn.Module):
    """Hidden states to this rank's logits."""

    weight: Tensor

    def __init__(self, name: str, vocab_size: int, hidden_size: int, mesh: Mesh):
        super().__init__()
        self.name, self.shape, self.mesh = name, (vocab_size, hidden_size), mesh

    def load(self, source: WeightSource) -> None:
        self.weight = source.tensor(f"{self.name}.weight", self.shape, cut=Cut(OUT, self.mesh.tp))

    def forward(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] to [rows, vocab / tp], in the model's dtype."""
        return ops.plain_linear(hidden, self.weight)
