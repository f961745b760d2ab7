"""One rank's share of a step: model, cache, slots, drafts. It sees plans and token ids, never a request.

A step is one flow: the plan's deltas reach the slots; inputs are made from them; the model computes; tokens are chosen
and drafts verified; new drafts are proposed; the slots are moved on. All of it is the device's work, in the order of
the plans, and the next step needs nothing that the host has seen; results follow when they are there.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from deepseek_fp4_plugin.engine import diagnosis, sampler
from deepseek_fp4_plugin.engine.input_batch import Step, build, build_uniform, in_batch_order, most_blocks
from deepseek_fp4_plugin.engine.recorded_steps import Kind, RecordedSteps, Sizes
from deepseek_fp4_plugin.engine.slots import Slots
from deepseek_fp4_plugin.engine.speculative import MtpDrafter, Verified, passes_relaxed, thinking_after, verify
from deepseek_fp4_plugin.engine.step_plan import (
    NOT_FINITE,
    NOTHING_ALLOWED,
    PlanRow,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.kernels.recording import Results, cut
from deepseek_fp4_plugin.kernels.transfer import to_device
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM


class ModelRunner:
    """`submit` starts a step, `collect` gives the oldest one's result; `run` is both.

    cache: its last block is the dummy's, which no plan names.  max_batch_size: requests at once.
    max_blocks: of one request; None: all.  sizes: steps to record; None: what the device does without being told.
    reads: whether the host may look at what the device has computed while a step is made. On a CPU that costs nothing;
    on a GPU it would wait for everything submitted before, and cannot be captured.
    """

    def __init__(
        self,
        model: DeepseekV3ForCausalLM,
        cache: Tensor,
        num_drafts: int = 0,
        max_batch_size: int = 64,
        max_blocks: int | None = None,
        sizes: Sizes | None = None,
        reads: bool | None = None,
    ):
        self.model, self.cache = model, cache
        self.num_drafts, self.block_size, self.device = num_drafts, cache.shape[2], cache.device
        self.reads = self.device.type == "cpu" if reads is None else reads
        blocks = cache.shape[1] - 1
        self.slots = Slots(max_batch_size, min(max_blocks or blocks, blocks), num_drafts, blocks, self.device)
        self.drafter = MtpDrafter(model, cache, num_drafts) if num_drafts else None
        if sizes is None:
            sizes = Sizes.of(None, self.device, num_drafts, max_batch_size)
        self.recorded = RecordedSteps(self._uniform, sizes, self.slots.dummy, self.device)
        self.expert_load: dict[int, Tensor] = {}  # the model's counts, where they are asked for
        self._results: deque[PendingResult] = deque()
        self._times: list[float] = []

    def run(self, plan: StepPlan) -> StepResult:
        self.submit(plan)
        return self.collect()

    def collect(self) -> StepResult:
        """Wait for the oldest step that was submitted and not collected."""
        result = self._results.popleft().result()
        if self.expert_load:
            result.expert_load = {layer: counts.tolist() for layer, counts in self.expert_load.items()}
        return result

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> None:
        """Start a step; it is computed behind those submitted before."""
        rows = plan.rows
        self._times = [time.perf_counter()]
        begun = self._event()
        self.slots.apply(rows)
        kind = self._kind(rows)
        outputs = self.recorded(plan, kind)
        if outputs is None:
            outputs = self._compute(self._step(plan, kind), () if plan.uniform else rows)
        packed, greatest, hidden, logits = outputs
        sampled = [(i, row) for i, row in enumerate(rows) if row.sample]
        result = PendingResult(rows, [i for i, _ in sampled], self.num_drafts)
        base = 0
        for place, (index, row) in enumerate(sampled):
            count = self.slots.setups[row.slot].sampling.logprobs
            stop = base + row.num_drafts + 1
            if count is not None:
                own = packed[place, : stop - base]
                result.logprobs[index] = sampler.token_logprobs(logits[base:stop].float(), own, count)
            base = stop
        self._prompt_logprobs(rows, hidden, result)
        result.packed, result.greatest = _to_host(packed[: len(sampled)]), _to_host(greatest[: len(sampled)])
        result.begun, result.done = begun, self._event()
        result.times = [*self._times, time.perf_counter()]
        self._results.append(result)

    @property
    def dp_ranks(self) -> int:
        """Ranks that a plan tells of each other: none without attention data parallelism."""
        count = self.model.mesh.dp.count
        return count if count > 1 else 0

    @torch.inference_mode()
    def prepare(self, size: int, kind: Kind) -> None:
        """Compute a uniform step of so many requests, all of them the dummy's, and record it where that is done."""
        self.recorded.prepare(size, kind, self.dp_ranks)

    def explain(self, token_ids: Sequence[int]) -> str:
        """Why the logits of a request with these tokens are not finite: the first module and weight, one sentence."""
        return diagnosis.explain(self.model, token_ids, self.device)

    def _event(self) -> torch.cuda.Event | None:
        """Where a GPU is, of what was submitted."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _kind(self, rows: Sequence[PlanRow]) -> Kind:
        setups = [self.slots.setups[row.slot] for row in rows]
        relaxed = max((setup.relaxed_topk for setup in setups if setup.relaxed), default=1)
        return Kind(not all(setup.sampling.greedy for setup in setups), relaxed)

    def _step(self, plan: StepPlan, kind: Kind) -> Step:
        dp = plan.dp_tokens, plan.dp_sampled
        if not plan.uniform or not plan.rows:
            return build(plan.rows, self.slots, self.block_size, *dp)
        blocks = most_blocks(plan.rows, self.slots, self.block_size)
        places = to_device(np.array([row.slot for row in plan.rows], dtype=np.int64), self.device)
        return build_uniform(places, self.slots, kind.drawn, kind.relaxed_topk, *dp, blocks)

    def _uniform(self, places: Tensor, kind: Kind, ranks: int) -> Callable[[], Results]:
        """What RecordedSteps records."""
        tokens, sampled = (len(places) * (1 + self.num_drafts),) * ranks, (len(places),) * ranks
        step = build_uniform(places, self.slots, kind.drawn, kind.relaxed_topk, tokens, sampled)
        return lambda: self._compute(step, ())

    def _compute(self, step: Step, rows: Sequence[PlanRow]) -> Results:
        """The whole step: S rows of emitted tokens, accepted drafts and new drafts, int64 [S, 2 (K + 1)]; the greatest
        logits [S, K + 1]; hidden states [T, hidden]; logits [N, vocab].

        rows: of the plan, whose sampling may ask for what slots do not hold.
        """
        batch = step.forward(step.inputs(self.slots, self.block_size), self.block_size)
        hidden = self.model(batch, self.cache)
        logits = self.model.lm_head(hidden if step.wanted is None else hidden[step.wanted])
        best = ops.argmax(logits)
        if self.drafter is None:  # nothing is computed in between
            return *cut(partial(self._choose_and_advance, step, rows, batch), logits, best), hidden, logits
        verified = Verified(*cut(partial(self._choose, step, rows, batch), logits, best))
        starts = self.slots.numbers[: len(step.sampled_slots) + 1]
        drafts = self.drafter.propose(batch, hidden, verified, starts, step.dp_sampled)
        return *cut(partial(self._advance, step, batch, verified), *drafts), hidden, logits

    def _choose_and_advance(
        self, step: Step, rows: Sequence[PlanRow], batch: ForwardBatch, raw: Tensor, best: Tensor
    ) -> Results:
        """Both in one cut."""
        return self._advance(step, batch, self._choose(step, rows, batch, raw, best))

    def _choose(self, step: Step, rows: Sequence[PlanRow], batch: ForwardBatch, raw: Tensor, best: Tensor) -> Verified:
        """Target tokens, verified drafts, and from where drafting goes on.  best: int64 [N], argmax of `raw`."""
        self._times.append(time.perf_counter())
        slots, own = self.slots, step.sampled_slots
        logits, targets = raw, best
        if step.random is not None or step.relaxed_topk > 1 or not all(map(self._is_plain, rows)):
            logits = self._processed(raw, rows)
            targets = logits.argmax(-1)
        if step.random is not None:
            positions = batch.positions if step.wanted is None else batch.positions[step.wanted]
            slot_of = own[step.sample_of]
            targets = sampler.sample(logits, targets, slots, slot_of, positions + 1, step.random, self.reads)
        greatest = sampler.greatest(logits, targets, step.random)
        if step.uniform:
            emitted, greatest = targets.view(step.where.shape), greatest.view(step.where.shape)
        else:
            emitted, greatest = targets[step.where], greatest[step.where]
        if self.drafter is None:
            accepted, last = step.drafts, step.first  # all zero
        else:
            drafts = slots.tokens.index_select(0, own)[:, 1:]
            if not step.uniform:
                drafts = drafts.masked_fill(slots.numbers[: self.num_drafts] >= step.drafts.unsqueeze(1), -1)
            relaxed = None
            if step.relaxed_topk > 1:
                relaxed = self._passes_relaxed(step, logits, drafts)
            emitted, accepted = verify(emitted, drafts, relaxed)
            if step.relaxed_topk > 1:
                slots.thinking[own] = thinking_after(slots.thinking[own], emitted, accepted, slots.think_ids[own])
            last = step.first + accepted
        if step.uniform and self.drafter is None:
            assert batch.context_lens is not None
            newest = batch.context_lens
        else:
            newest = batch.positions.index_select(0, last) + 1
        self._times.append(time.perf_counter())
        return Verified(emitted, accepted, greatest, *self._draft_inputs(step, batch, emitted, last, newest))

    def _processed(self, raw: Tensor, rows: Sequence[PlanRow]) -> Tensor:
        """FP32 logits with what requests ask for; `raw` stays as it is."""
        logits, base = raw.float(), 0
        for row in rows:
            if not row.sample:
                continue
            sampling, stop = self.slots.setups[row.slot].sampling, base + row.num_drafts + 1
            if not self._is_plain(row):
                logits = logits.clone() if logits is raw else logits
                sampler.process(logits[base:stop], row, sampling)
            base = stop
        return logits

    def _is_plain(self, row: PlanRow) -> bool:
        return sampler.is_plain(row, self.slots.setups[row.slot].sampling)

    def _passes_relaxed(self, step: Step, logits: Tensor, drafts: Tensor) -> Tensor:
        """Which drafts the relaxed rule accepts, where the request's thinking lets it: bool [S, K]."""
        slots, own = self.slots, step.sampled_slots
        topk, delta = slots.relaxed_topk[own], slots.relaxed_delta[own]
        passed = passes_relaxed(logits[step.where[:, :-1]], drafts, topk, delta, step.relaxed_topk)
        return passed & (slots.thinking[own] & (topk > 1) & (delta > 0)).unsqueeze(1)

    def _draft_inputs(
        self, step: Step, batch: ForwardBatch, emitted: Tensor, last: Tensor, newest: Tensor
    ) -> tuple[Tensor, ...]:
        """Verified's next_ids and all behind it."""
        if self.drafter is None:
            none = last[:0]
            return none, last, newest, none, none, none, none
        ids = emitted.flatten()
        tables = batch.block_tables
        if step.wanted is not None:
            ids = torch.empty_like(batch.input_ids)
            ids[:-1] = batch.input_ids[1:]
            ids[step.wanted] = emitted.flatten()[step.following]
            ids[step.ends] = step.behind
            tables = self.slots.tables[:, : step.num_blocks][step.sampled_slots]
        assert tables is not None
        positions = newest + self.slots.numbers[: self.num_drafts - 1].unsqueeze(1)
        block = tables[self.slots.numbers[: len(newest)], positions // self.block_size]
        places = block * self.block_size + positions % self.block_size
        return ids, last, newest, positions, places, positions + 1, tables

    def _advance(self, step: Step, batch: ForwardBatch, verified: Verified, *drafts: Tensor) -> Results:
        """Slots as the next step finds them; what the host will want to know."""
        slots, own = self.slots, step.sampled_slots
        assert batch.context_lens is not None
        if not step.uniform:
            slots.starts[step.slots] = batch.context_lens
        slots.starts.index_copy_(0, own, verified.newest)
        tokens = verified.emitted
        if drafts:
            newest = verified.emitted.gather(1, verified.accepted.unsqueeze(1))
            tokens = torch.cat([newest, *[draft.unsqueeze(1) for draft in drafts]], 1)
        slots.tokens.index_copy_(0, own, tokens)
        slots.dummy_start.zero_()
        parts = [verified.emitted, verified.accepted.unsqueeze(1)]
        if drafts:
            parts.append(tokens[:, 1:])
        return torch.cat(parts, 1), verified.greatest

    def _prompt_logprobs(self, rows: Sequence[PlanRow], hidden: Tensor, result: "PendingResult") -> None:
        """Of known tokens behind those computed."""
        wanted = [row for row in rows if row.prompt_targets]
        if not wanted:
            return
        begins, begin = {}, 0
        for index in in_batch_order(rows):
            begins[index], begin = begin, begin + rows[index].num_tokens
        for index, row in enumerate(rows):
            targets, begin = list(row.prompt_targets), begins[index] + row.prompt_skip
            count = self.slots.setups[row.slot].sampling.prompt_logprobs or 0
            parts = []
            for part in range(0, len(targets), 256):  # a long prompt's logits would not fit at once
                ids = torch.tensor(targets[part : part + 256], device=self.device)
                logits = self.model.lm_head(hidden[begin + part : begin + part + len(ids)]).float()
                parts.append(sampler.token_logprobs(logits, ids, count))
            if parts:
                result.prompt_logprobs[index] = parts


@dataclass
class PendingResult:
    """A step's result on its way from the device. packed, greatest: see ModelRunner._compute."""

    rows: Sequence[PlanRow]
    sampled: list[int]
    num_drafts: int
    packed: Tensor = field(init=False)
    greatest: Tensor = field(init=False)
    begun: torch.cuda.Event | None = None
    done: torch.cuda.Event | None = None
    logprobs: dict[int, sampler.LogprobTensors] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[sampler.LogprobTensors]] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)

    def result(self) -> StepResult:
        """Waits for the device."""
        if self.done is not None:
            self.done.synchronize()
        result = StepResult([[] for _ in self.rows], [[] for _ in self.rows])
        width = self.num_drafts + 1
        greatest = self.greatest.tolist()
        finite = math.isfinite(sum(map(sum, greatest)))
        for place, (index, values) in enumerate(zip(self.sampled, self.packed.tolist(), strict=True)):
            emitted = result.tokens[index] = values[: values[width] + 1]
            result.drafts[index] = values[width + 1 :]
            if not finite:
                self._fail(result, index, greatest[place][: len(emitted)])
            if index in self.logprobs:
                result.logprobs[index] = self.logprobs[index].entries(emitted)
        for index, parts in self.prompt_logprobs.items():
            self._add_prompt_logprobs(result, index, parts)
        if self.begun is not None and self.done is not None:
            result.forward_seconds = self.begun.elapsed_time(self.done) / 1000  # all of it
        elif len(self.times) == 4:
            began, forward, chosen, ended = self.times
            result.forward_seconds, result.sample_seconds = forward - began, chosen - forward
            result.draft_seconds = ended - chosen
        return result

    def _fail(self, result: StepResult, index: int, greatest: Sequence[float]) -> None:
        wrong = [value for value in greatest if not math.isfinite(value)]
        if wrong:
            result.failures[index] = NOTHING_ALLOWED if wrong[0] == -math.inf else NOT_FINITE

    def _add_prompt_logprobs(self, result: StepResult, index: int, parts: Sequence[sampler.LogprobTensors]) -> None:
        targets = list(self.rows[index].prompt_targets)
        entries: list[TokenLogprobs] = []
        for part in parts:
            entries += part.entries(targets[len(entries) : len(entries) + len(part.ranks)])
        if not all(math.isfinite(entry[token].logprob) for entry, token in zip(entries, targets, strict=True)):
            result.failures[index] = NOT_FINITE
        result.prompt_logprobs[index] = entries


def _to_host(tensor: Tensor) -> Tensor:
    """A copy that is complete once the device has done what was submitted so far."""
    if tensor.device.type != "cuda":
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
