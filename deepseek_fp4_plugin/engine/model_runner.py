"""One rank's share of a step: model, cache, drafts. It sees plans and token ids, never a request."""

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_fp4_plugin.engine import diagnosis, sampler
from deepseek_fp4_plugin.engine.input_batch import InputBatch, build
from deepseek_fp4_plugin.engine.recorded_steps import RecordedSteps
from deepseek_fp4_plugin.engine.speculative import MtpDrafter, passes_relaxed, verify
from deepseek_fp4_plugin.engine.step_plan import (
    NOT_FINITE,
    NOTHING_ALLOWED,
    PlanRow,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM


class ModelRunner:
    """run(plan) -> result. Keeps nothing of a step but the cache's content, and recordings of step shapes."""

    def __init__(self, model: DeepseekV3ForCausalLM, cache: Tensor, num_drafts: int = 0):
        self.model, self.cache = model, cache
        self.block_size = cache.shape[2]
        self.device = cache.device
        self.drafter = MtpDrafter(model, cache, num_drafts) if num_drafts else None
        self.recorded = RecordedSteps(self._hidden_and_logits, self.device, *cache.shape[1:3])

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        rows = plan.rows
        began = time.perf_counter()
        batch = build(rows, self.block_size, self.device, plan.dp_tokens or None)
        replayed = self.recorded(batch=batch.forward)
        hidden, logits = replayed or (self.model(batch.forward, self.cache), None)
        computed = time.perf_counter()
        result = StepResult([[] for _ in rows], [[] for _ in rows])
        sampled = [i for i, row in enumerate(rows) if row.sample]
        emitted = accepted = positions = None
        if sampled:
            positions = self._sampled_positions(rows, batch, sampled)
            if logits is None:
                logits = self.model.compute_logits(hidden[positions])
            else:
                logits = logits[positions].float()
            emitted, accepted = self._sample(rows, sampled, logits, result)
        self._prompt_logprobs(rows, batch, hidden, result)
        chosen = time.perf_counter()
        if self.drafter is not None:
            none = torch.empty(0, dtype=torch.int64, device=self.device)
            drafts = self.drafter.propose(
                batch,
                rows,
                hidden,
                sampled,
                none if positions is None else positions,
                none if emitted is None else emitted,
                accepted or [],
                plan.dp_sampled,
            )
            for index, draft in zip(sampled, drafts, strict=True):
                result.drafts[index] = draft
        result.forward_seconds = computed - began
        result.sample_seconds = chosen - computed
        result.draft_seconds = time.perf_counter() - chosen
        return result

    def explain(self, token_ids: Sequence[int]) -> str:
        """Why the logits of a request with these tokens are not finite: the first module and weight, one sentence."""
        return diagnosis.explain(self.model, token_ids, self.device)

    def _hidden_and_logits(self, *, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        hidden = self.model(batch, self.cache)
        return hidden, self.model.lm_head(hidden)

    def _sampled_positions(self, rows: Sequence[PlanRow], batch: InputBatch, sampled: list[int]) -> Tensor:
        """Where the last known token and the drafts of each sampled row lie in the batch: int64 [N]."""
        positions: list[int] = []
        for i in sampled:
            end = batch.starts[i] + len(rows[i].tokens)
            positions += range(end - 1 - rows[i].num_drafts, end)
        return torch.tensor(positions, device=self.device)

    def _sample(
        self, rows: Sequence[PlanRow], sampled: list[int], logits: Tensor, result: StepResult
    ) -> tuple[Tensor, list[int]]:
        """Fill result.tokens and .logprobs; the token behind each of the N positions, and drafts accepted by row.

        logits: FP32 [N, vocab], changed by what the requests ask for.
        """
        chosen = [rows[i] for i in sampled]
        bases, total = [], 0
        for row in chosen:
            bases.append(total)
            total += row.num_drafts + 1
        raw = {
            k: logits[base : base + row.num_drafts + 1].clone()
            for k, (row, base) in enumerate(zip(chosen, bases, strict=True))
            if row.sampling.logprobs is not None
        }
        for row, base in zip(chosen, bases, strict=True):
            if not sampler.is_plain(row):
                sampler.process(logits[base : base + row.num_drafts + 1], row)
        targets = sampler.sample(logits, chosen, bases)
        if total == len(chosen):  # no drafts anywhere
            emitted, accepted = targets, [0] * len(chosen)
            tokens = [[token] for token in targets.tolist()]
        else:
            emitted, accepted, tokens = self._verify(chosen, bases, logits, targets)
        for index, ids in zip(sampled, tokens, strict=True):
            result.tokens[index] = ids
        greatest = sampler.greatest(logits, targets, chosen).tolist()
        if not all(map(math.isfinite, greatest)):
            for index, base, count in zip(sampled, bases, accepted, strict=True):
                used = [value for value in greatest[base : base + count + 1] if not math.isfinite(value)]
                if used:
                    result.failures[index] = NOTHING_ALLOWED if used[0] == -math.inf else NOT_FINITE
        for k, own in raw.items():
            ids = tokens[k]
            count = chosen[k].sampling.logprobs or 0
            result.logprobs[sampled[k]] = sampler.token_logprobs(own[: len(ids)], ids, count)
        return emitted, accepted

    def _verify(
        self, rows: list[PlanRow], bases: list[int], logits: Tensor, targets: Tensor
    ) -> tuple[Tensor, list[int], list[list[int]]]:
        width = max(row.num_drafts for row in rows)
        padded = [[*row.tokens[len(row.tokens) - row.num_drafts :], *[-1] * (width - row.num_drafts)] for row in rows]
        drafts = torch.tensor(padded, device=self.device)
        counts = torch.tensor([row.num_drafts for row in rows], device=self.device).unsqueeze(1)
        steps = torch.arange(width + 1, device=self.device)
        where = torch.tensor(bases, device=self.device).unsqueeze(1) + steps.minimum(counts)  # [S, width + 1]
        relaxed = None
        loose = [k for k, row in enumerate(rows) if row.relaxed_delta > 0 and row.relaxed_topk > 1 and row.num_drafts]
        if loose:
            relaxed = torch.zeros_like(drafts, dtype=torch.bool)
            relaxed[loose] = passes_relaxed(
                logits[where[loose, :width]],
                drafts[loose],
                torch.tensor([rows[k].relaxed_topk for k in loose], device=self.device),
                torch.tensor([rows[k].relaxed_delta for k in loose], device=self.device),
            )
        emitted, accepted_tensor = verify(targets[where], drafts, relaxed)
        accepted = accepted_tensor.tolist()
        tokens = [ids[: n + 1] for ids, n in zip(emitted.tolist(), accepted, strict=True)]
        return emitted[steps <= counts], accepted, tokens

    def _prompt_logprobs(self, rows: Sequence[PlanRow], batch: InputBatch, hidden: Tensor, result: StepResult) -> None:
        for index, row in enumerate(rows):
            if row.prompt_targets:
                begin = batch.starts[index] + row.prompt_skip
                targets = list(row.prompt_targets)
                entries: list[TokenLogprobs] = []
                for part in range(0, len(targets), 256):  # a long prompt's logits would not fit at once
                    ids = targets[part : part + 256]
                    logits = self.model.compute_logits(hidden[begin + part : begin + part + len(ids)])
                    entries += sampler.token_logprobs(logits, ids, row.sampling.prompt_logprobs or 0)
                if not all(math.isfinite(entry[token].logprob) for entry, token in zip(entries, targets, strict=True)):
                    result.failures[index] = NOT_FINITE
                result.prompt_logprobs[index] = entries
