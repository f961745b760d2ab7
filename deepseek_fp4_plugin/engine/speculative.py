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

import numpy as np
import torch
from torch import Tensor

from deepseek_fp4_plugin.engine.input_batch import InputBatch, build_single
from deepseek_fp4_plugin.engine.recorded_steps import RecordedSteps
from deepseek_fp4_plugin.engine.step_plan import PlanRow
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


def passes_relaxed(logits: Tensor, drafts: Tensor, topk: Tensor, delta: Tensor) -> Tensor:
    """Which drafts the relaxed rule accepts: bool [S, K]. Never one that a grammar or a ban has put at -inf: with few
    tokens left it could be among the topk, and its probability of 0 within delta of a best one below delta.

    logits: FP32 [S, K, vocab].  drafts: int64 [S, K].  topk: int64 [S], at least 1.  delta: FP32 [S].
    """
    p = logits.softmax(-1)
    best, tokens = p.topk(min(int(topk.max()), p.shape[-1]))
    in_topk = torch.arange(best.shape[-1], device=p.device) < topk.view(-1, 1, 1)
    near = best >= best[..., :1] - delta.view(-1, 1, 1)
    possible = logits.gather(-1, drafts.clamp(min=0).unsqueeze(-1)).squeeze(-1) > -torch.inf
    return ((tokens == drafts.unsqueeze(-1)) & in_topk & near).any(-1) & possible


class MtpDrafter:
    """Proposes `num_drafts` tokens for each sampled row, and keeps the MTP module's latents complete for the others."""

    def __init__(self, model: DeepseekV3ForCausalLM, cache: Tensor, num_drafts: int):
        assert model.mtp is not None
        self.model, self.mtp, self.num_drafts = model, model.mtp, num_drafts
        self.cache = cache[model.mtp.index]
        self.recorded = RecordedSteps(self._hidden_and_logits, cache.device, cache.shape[1])

    def propose(
        self,
        batch: InputBatch,
        rows: list[PlanRow],
        hidden: Tensor,
        sampled: list[int],
        sampled_tokens: Tensor,
        emitted: Tensor,
        accepted: list[int],
    ) -> list[list[int]]:
        """Drafts of each sampled row.

        hidden: [T, hidden] of the target.  sampled: plan rows with an emission.
        sampled_tokens, emitted: int64 [N], each sampled position in the batch and the token that follows it.
        """
        ids = torch.empty_like(batch.forward.input_ids)
        ids[:-1] = batch.forward.input_ids[1:]
        ids[sampled_tokens] = emitted
        behind = [i for i, row in enumerate(rows) if not row.sample]
        if behind:
            ends = [batch.starts[i] + len(rows[i].tokens) - 1 for i in behind]
            ids[torch.tensor(ends, device=ids.device)] = torch.tensor(
                [rows[i].next_token for i in behind], device=ids.device
            )
        output, logits = self._forward(replace(batch.forward, input_ids=ids), hidden)
        if not sampled:
            return []
        # Each sampled request's last accepted token: where it lies in the batch, and its position.
        offsets = [len(rows[i].tokens) - 1 - rows[i].num_drafts + n for i, n in zip(sampled, accepted, strict=True)]
        last = [batch.starts[i] + offset for i, offset in zip(sampled, offsets, strict=True)]
        positions = np.array([rows[i].start + offset for i, offset in zip(sampled, offsets, strict=True)])
        blocks = [rows[i].blocks for i in sampled]
        rows_of_last = torch.tensor(last, device=ids.device)
        state, draft = output[rows_of_last], self._best(output, logits, rows_of_last)
        drafts = [draft]
        for _ in range(self.num_drafts - 1):
            positions = positions + 1
            step = build_single(draft, positions, blocks, self.cache.shape[1])
            state, logits = self._forward(step, state)
            draft = self._best(state, logits, slice(None))
            drafts.append(draft)
        return torch.stack(drafts, 1).tolist()

    def _forward(self, batch: ForwardBatch, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        replayed = self.recorded(hidden, batch=batch)
        if replayed is None:
            return self._hidden(hidden, batch), None
        output, logits = replayed
        return output, logits

    def _hidden(self, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        embedded = self.model.model.embed_tokens(batch.input_ids)
        cos, sin = self.model.model.rotary(batch.positions)
        return self.mtp(embedded, hidden, cos, sin, batch, self.cache)

    def _hidden_and_logits(self, hidden: Tensor, *, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        output = self._hidden(hidden, batch)
        return output, self.model.lm_head(output)

    def _best(self, hidden: Tensor, logits: Tensor | None, rows: Tensor | slice) -> Tensor:
        """Most probable token of each row, int64 [N]."""
        return (self.model.compute_logits(hidden[rows]) if logits is None else logits[rows]).argmax(-1)
