"""MTP speculative decoding: verify the last step's drafts, propose the next.

Verification of drafts d_1..d_K against target tokens t_1..t_{K+1} (argmax, or a draw where the request samples):
  strict    accept d_i while d_i == t_i. Every emitted token is a target token: greedy output is exactly that without
            drafts, and sampled output follows exactly the target's distribution, because for a draft that is one fixed
            token "draw, then compare" accepts with the same probability as rejection sampling.
  relaxed   inside the thinking phase, accept d_i also if it is among the `topk` most probable tokens and its
            probability (softmax without temperature) is at least the best one's minus `delta`. The output no longer
            follows the target's distribution.
Then emit the accepted drafts and the target token of the first row that was not accepted. Source: TensorRT-LLM's rules,
docs/speculative.md.

Drafting: the MTP module reads, at each position just computed, the target's hidden state (after the final norm) and the
token that follows; the last accepted position gives draft 1. Each further draft feeds the module's own output and the
previous draft back, one position on. Latents written beyond the accepted tokens are overwritten by the next step.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM


def verify(targets: Tensor, drafts: Tensor, relaxed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """targets: int64 [S, K + 1].  drafts: int64 [S, K], -1 where a request has fewer.  relaxed: bool [S, K].

    Returns emitted tokens, int64 [S, K + 1], and how many drafts were accepted, int64 [S]; the first accepted + 1
    emitted tokens count, the rest is filler.
    """
    width = drafts.shape[1]
    accept = targets[:, :width] == drafts
    if relaxed is not None:
        accept |= relaxed
    accept &= drafts >= 0
    accepted = accept.long().cumprod(1).sum(1)
    kept = torch.arange(width, device=drafts.device) < accepted.unsqueeze(1)
    emitted = targets.clone()
    emitted[:, :width] = torch.where(kept, drafts, targets[:, :width])
    return emitted, accepted


def passes_relaxed(logits: Tensor, drafts: Tensor, topk: Tensor, delta: Tensor, most: int) -> Tensor:
    """Which drafts the relaxed rule accepts: bool [S, K]. Never one that a grammar or a ban has put at -inf: with few
    tokens left it could be among the topk, and its probability of 0 within delta of a best one below delta.

    logits: FP32 [S, K, vocab].  drafts: int64 [S, K].  topk: int64 [S], from 1 to `most`.  delta: FP32 [S].
    """
    p = logits.softmax(-1)
    best, tokens = p.topk(min(most, p.shape[-1]))
    in_topk = torch.arange(best.shape[-1], device=p.device) < topk.view(-1, 1, 1)
    near = best >= best[..., :1] - delta.view(-1, 1, 1)
    possible = logits.gather(-1, drafts.clamp(min=0).unsqueeze(-1)).squeeze(-1) > -torch.inf
    return ((tokens == drafts.unsqueeze(-1)) & in_topk & near).any(-1) & possible


def thinking_after(thinking: Tensor, emitted: Tensor, accepted: Tensor, think_ids: Tensor) -> Tensor:
    """Whether each request is inside its thinking phase behind what it emitted: bool [S].

    thinking: bool [S], before.  emitted, accepted: what `verify` gave.  think_ids: int64 [S, 2], start and end.
    """
    place = torch.arange(emitted.shape[1], device=emitted.device)
    counts = place <= accepted.unsqueeze(1)
    found = (emitted.unsqueeze(-1) == think_ids.unsqueeze(1)) & counts.unsqueeze(-1)  # [S, K + 1, 2]
    last = torch.where(found, place.view(1, -1, 1), -1).amax(1)
    return torch.where(last[:, 0] == last[:, 1], thinking, last[:, 0] > last[:, 1])


class Verified(NamedTuple):
    """What a step chose, and where drafting goes on from it. S requests that sampled, T tokens of the batch.

    emitted: int64 [S, K + 1].  accepted: int64 [S].  greatest: FP32 [S, K + 1], see sampler.greatest.
    next_ids: int64 [T], the token behind each of the batch's.  last: int64 [S], row of the last accepted token.
    newest: int64 [S], position of the token behind it.  positions, places, contexts: int64 [K - 1, S], of the steps by
    which the MTP module recurs, with their cache slots.  tables: int64 [S, blocks].
    """

    emitted: Tensor
    accepted: Tensor
    greatest: Tensor
    next_ids: Tensor
    last: Tensor
    newest: Tensor
    positions: Tensor
    places: Tensor
    contexts: Tensor
    tables: Tensor


class MtpDrafter:
    """Proposes `num_drafts` tokens for each sampled row, and keeps the MTP module's latents complete for the others."""

    def __init__(self, model: DeepseekV3ForCausalLM, cache: Tensor, num_drafts: int):
        assert model.mtp is not None
        self.model, self.mtp, self.num_drafts = model, model.mtp, num_drafts
        self.cache = cache[model.mtp.index]

    def propose(
        self, batch: ForwardBatch, hidden: Tensor, verified: Verified, starts: Tensor, dp_sampled: tuple[int, ...]
    ) -> list[Tensor]:
        """num_drafts tensors, int64 [S].

        hidden: [T, hidden] of the target.  starts: 0, 1, ... S.  dp_sampled: see StepPlan.
        """
        state = self._hidden(hidden, replace(batch, input_ids=verified.next_ids))
        count = len(verified.last)
        if not count and not any(dp_sampled):
            return [verified.last] * self.num_drafts
        state = ops.embedding(verified.last, state)
        drafts = [self.model.lm_head.argmax(state)]
        steps = zip(verified.positions, verified.places, verified.contexts, strict=True)
        for position, place, context in steps:
            step = ForwardBatch(
                input_ids=drafts[-1],
                positions=position,
                slot_mapping=place,
                block_tables=verified.tables,
                context_lens=context,
                query_start=starts,
                num_decode_requests=count,
                num_decode_tokens=count,
                max_query=1,
                max_context=verified.tables.shape[1] * self.cache.shape[1],
                dp_tokens=dp_sampled or None,
            )
            state = self._hidden(state, step)
            drafts.append(self.model.lm_head.argmax(state))
        return drafts

    def _hidden(self, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        embedded = self.model.model.embed_tokens(batch.input_ids)
        cos, sin = self.model.model.rotary(batch.positions)
        return self.mtp(embedded, hidden, cos, sin, batch, self.cache)
