"""How far a model's next-token distributions are from another's on the same text: KL divergence, top-1 agreement."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from deepseek_fp4_plugin.evaluation.statistics import Estimate, estimate
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM


@dataclass(frozen=True)
class Divergence:
    """kl: mean KL(reference || model) in nats.  agreement: percent of positions with the same most probable token.

    Intervals are over texts.
    """

    kl: float
    kl_half: float
    agreement: Estimate
    positions: int


@torch.inference_mode()
def divergence(
    reference: DeepseekV3ForCausalLM,
    model: DeepseekV3ForCausalLM,
    texts: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] | None = None,
) -> Divergence:
    """texts: token ids; each is one forward of both models.  ValueError for vocabularies that differ, or no text."""
    if reference.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the models have vocabularies of {reference.config.vocab_size} and {model.config.vocab_size} tokens; "
            "distributions can be compared over the same one only"
        )
    kls: dict[str, list[float]] = {}
    same: dict[str, list[float]] = {}
    for index, ids in enumerate(texts):
        logs = [_log_probabilities(m, ids) for m in (reference, model)]
        kls[str(index)] = ((logs[0].exp() * (logs[0] - logs[1])).sum(-1)).tolist()
        same[str(index)] = (logs[0].argmax(-1) == logs[1].argmax(-1)).float().tolist()
        if progress is not None:
            progress(index + 1, len(texts))
    kl = estimate(kls)
    return Divergence(kl.mean / 100, kl.half / 100, estimate(same), kl.samples)


def _log_probabilities(model: DeepseekV3ForCausalLM, ids: Sequence[int]) -> torch.Tensor:
    """FP32 [tokens, vocab]."""
    device = model.model.norm.weight.device
    hidden = model(ForwardBatch.from_sequences([ids], device))
    return model.compute_logits(hidden).log_softmax(-1)
