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

from deepseek_fp4_plugin.engine.input_batch import InputBatch, build_steps
from deepseek_fp4_plugin.engine.recorded_steps import RecordedSteps
from deepseek_fp4_plugin.engine.step_plan import PlanRow
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
        self.recorded = RecordedSteps(self._drafts, cache.device, *cache.shape[1:3])

    def propose(
        self,
        batch: InputBatch,
        rows: list[PlanRow],
        hidden: Tensor,
        sampled: list[int],
        sampled_tokens: Tensor,
        emitted: Tensor,
        accepted: list[int],
        dp_sampled: tuple[int, ...] = (),
    ) -> list[list[int]]:
        """Drafts of each sampled row.

        hidden: [T, hidden] of the target.  sampled: plan rows with an emission.
        sampled_tokens, emitted: int64 [N], each sampled position in the batch and the token that follows it.
        dp_sampled: under attention data parallelism how many rows each rank samples; one without any steps along.
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
        forward = replace(batch.forward, input_ids=ids)
        if not sampled and not any(dp_sampled):
            self._hidden(hidden, forward)
            return []
        # Each sampled request's last accepted token: where it lies in the batch, and its position.
        offsets = [len(rows[i].tokens) - 1 - rows[i].num_drafts + n for i, n in zip(sampled, accepted, strict=True)]
        last = [batch.starts[i] + offset for i, offset in zip(sampled, offsets, strict=True)]
        firsts = np.array(
            [rows[i].start + offset + 1 for i, offset in zip(sampled, offsets, strict=True)], dtype=np.int64
        )
        steps, tables = build_steps(
            firsts, self.num_drafts - 1, [rows[i].blocks for i in sampled], self.cache.shape[1], ids.device
        )
        tensors = hidden, torch.tensor(last, dtype=torch.int64, device=ids.device), *steps
        drafts = None
        # If all rows are sampled, in the batch's order, the batch's block tables are the steps' too.
        if len(sampled) == len(rows) and batch.order == sampled and not dp_sampled:
            drafts = self.recorded(*tensors, batch=forward)
        if drafts is None:
            drafts = self._drafts(*tensors, batch=forward, tables=tables, dp_sampled=dp_sampled)
        return torch.stack(drafts, 1).tolist()

    def _drafts(
        self,
        hidden: Tensor,
        last: Tensor,
        positions: Tensor,
        slots: Tensor,
        contexts: Tensor,
        starts: Tensor,
        *,
        batch: ForwardBatch,
        tables: Tensor | None = None,
        dp_sampled: tuple[int, ...] = (),
    ) -> tuple[Tensor, ...]:
        """num_drafts tensors int64 [S].  last: int64 [S], rows of the batch.  Others: see input_batch.build_steps."""
        state = ops.embedding(last, self._hidden(hidden, batch))
        drafts = [self.model.lm_head.argmax(state)]
        tables = batch.block_tables if tables is None else tables
        assert tables is not None
        for position, slot, context in zip(positions, slots, contexts, strict=True):
            step = ForwardBatch(
                input_ids=drafts[-1],
                positions=position,
                slot_mapping=slot,
                block_tables=tables,
                context_lens=context,
                query_start=starts,
                num_decode_requests=len(last),
                num_decode_tokens=len(last),
                max_query=1,
                max_context=tables.shape[1] * self.cache.shape[1],
                dp_tokens=dp_sampled or None,
            )
            state = self._hidden(state, step)
            drafts.append(self.model.lm_head.argmax(state))
        return tuple(drafts)

    def _hidden(self, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        embedded = self.model.model.embed_tokens(batch.input_ids)
        cos, sin = self.model.model.rotary(batch.positions)
        return self.mtp(embedded, hidden, cos, sin, batch, self.cache)
