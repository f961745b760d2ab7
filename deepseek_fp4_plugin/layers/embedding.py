"""Vocabulary at the model's two ends, cut by rows over the tensor-parallel ranks."""

import torch
from torch import Tensor, nn

from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.kernels.recording import cut
from deepseek_fp4_plugin.layers.weight_source import OUT, Cut, WeightSource
from deepseek_fp4_plugin.parallel.mesh import Mesh


class VocabEmbedding(nn.Module):
    """Token ids to rows. A rank adds zeros for tokens whose rows it does not hold."""

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
        return cut(self._over_ranks, input_ids)[0]

    def _over_ranks(self, input_ids: Tensor) -> tuple[Tensor]:
        start, stop = self.mesh.tp.bounds(self.shape[0], self.name)
        here = (input_ids >= start) & (input_ids < stop)
        rows = ops.embedding(torch.where(here, input_ids - start, 0), self.weight)
        return (self.mesh.tp_group.all_reduce(rows * here.unsqueeze(-1)),)


class LanguageModelHead(nn.Module):
    """Hidden states to logits of the whole vocabulary, on every rank."""

    weight: Tensor

    def __init__(self, name: str, vocab_size: int, hidden_size: int, mesh: Mesh):
        super().__init__()
        self.name, self.shape, self.mesh = name, (vocab_size, hidden_size), mesh

    def load(self, source: WeightSource) -> None:
        self.weight = source.tensor(f"{self.name}.weight", self.shape, cut=Cut(OUT, self.mesh.tp))

    def forward(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] to [rows, vocab], in the model's dtype."""
        own = ops.plain_linear(hidden, self.weight)
        return own if self.mesh.tp.count == 1 else cut(self._gathered, own)[0]

    def argmax(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] to the best token of each row, int64 [rows]; of equal ones the first.

        Ranks exchange their best tokens, not their logits.
        """
        own = ops.plain_linear(hidden, self.weight)
        best = ops.argmax(own)
        return best if self.mesh.tp.count == 1 else cut(self._best, own, best)[0]

    def _gathered(self, own: Tensor) -> tuple[Tensor]:
        slices = self.mesh.tp_group.all_gather(own).view(self.mesh.tp.count, *own.shape)
        return (slices.transpose(0, 1).flatten(1),)

    def _best(self, own: Tensor, best: Tensor) -> tuple[Tensor]:
        start, _ = self.mesh.tp.bounds(self.shape[0], self.name)
        logit = own.gather(1, best.unsqueeze(1)).squeeze(1)
        pairs = torch.stack((logit.float(), (best + start).float()), 1)  # FP32 holds ids up to 2^24 exactly
        logits, ids = self.mesh.tp_group.all_gather(pairs).view(self.mesh.tp.count, -1, 2).unbind(-1)
        return (ids.gather(0, logits.argmax(0, keepdim=True)).squeeze(0).long(),)
