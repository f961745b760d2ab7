"""The scheduler: which requests compute how many tokens in the next step.

One rule, vLLM's: a request's computed tokens catch up with its tokens (prompt, output, drafts), as far as the step's
budget and the cache go. Prompt chunks, prefix hits, decode, drafts and preempted requests are all that rule.
Running requests come first, by priority and age; when the cache is full the last of them gives its blocks back and
starts over later, so the oldest always advances and nobody starves.
"""

import heapq
import time

from deepseek_fp4_plugin.engine.block_manager import BlockManager
from deepseek_fp4_plugin.engine.request import Emission, GenerationError, Request
from deepseek_fp4_plugin.engine.step_plan import NOT_FINITE, PlanRow, StepPlan, StepResult


class Scheduler:
    """max_batch_size: running requests.  max_num_tokens: tokens a step.  max_seq_len: prompt + output.

    num_drafts: K, drafts after each step (0: no MTP).  think_ids: (start, end) of the thinking phase, if any.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_batch_size: int,
        max_num_tokens: int,
        max_seq_len: int,
        num_drafts: int = 0,
        think_ids: tuple[int, int] | None = None,
    ):
        self.blocks = blocks
        self.max_batch_size, self.max_num_tokens, self.max_seq_len = max_batch_size, max_num_tokens, max_seq_len
        self.num_drafts, self.think_ids = num_drafts, think_ids
        # The MTP recurrence writes K - 1 positions behind the last draft of a step.
        self.num_lookahead = max(0, num_drafts - 1)
        self.running: list[Request] = []  # in the order they are served
        self._waiting: list[tuple[int, int, Request]] = []  # heap of (-priority, arrival, request)
        self._deadlines: list[tuple[float, int, Request]] = []
        self._planned: list[tuple[Request, int]] = []  # what the step in flight computes, and how many tokens of it
        self._arrivals = 0
        self.num_waiting = 0
        self.num_preemptions = 0
        self.prompt_tokens = self.cached_tokens = 0

    # ------------------------------------------------------------------ coming and going

    def add(self, request: Request) -> None:
        request.arrival = self._arrivals
        self._arrivals += 1
        request.watched = request.stopping.stop_ids.union(self.think_ids or ())
        if self.think_ids:
            request.thinking = self.think_ids[0] in request.token_ids
        self._wait(request)
        if request.deadline is not None:
            self._prune(self._deadlines)
            heapq.heappush(self._deadlines, (request.deadline, request.arrival, request))

    def finish(self, request: Request, reason: str) -> None:
        """End a request in any state; its blocks return. Doing it twice is doing it once."""
        if request.finish_reason is not None:
            return
        request.finish_reason = reason
        if request.blocks:
            self.blocks.free(request.blocks)
            del request.blocks[:]
        if request in self.running:
            self.running.remove(request)
        else:
            self.num_waiting -= 1  # its heap entry is dropped when it comes up

    def expired(self) -> list[Request]:
        """Requests whose deadline has passed; the caller finishes them."""
        if not self._deadlines:
            return []
        now, late = time.monotonic(), []
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[2]
            if request.finish_reason is None:
                late.append(request)
        return late

    @property
    def has_work(self) -> bool:
        return bool(self.running) or self.num_waiting > 0

    # ------------------------------------------------------------------ one step

    def schedule(self) -> StepPlan:
        """Plan a step; `update` must be called with its result before the next."""
        budget = self.max_num_tokens
        rows: list[PlanRow] = []
        planned = self._planned = []
        preemptions, index = self.num_preemptions, 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            count = min(len(request.token_ids) + len(request.drafts) - request.num_computed, budget)
            if not self._reserve(request, count):
                break  # the request itself was the last, and gave way
            rows.append(row := self._row(request, count))
            planned.append((request, len(row.tokens)))
            budget -= count
            index += 1
        admitting = self.num_preemptions == preemptions  # else the victim would take its blocks straight back
        while admitting and budget > 0 and self.num_waiting and len(self.running) < self.max_batch_size:
            request = self._next_waiting()
            count = self._admit(request, budget)
            if count == 0:
                break
            rows.append(self._row(request, count))
            planned.append((request, count))
            budget -= count
        return StepPlan(rows, self.max_num_tokens - budget)

    def update(self, result: StepResult) -> list[Emission]:
        """Take a step's result: append tokens, end requests, name full blocks. What each request got."""
        emissions = []
        for index, (request, count) in enumerate(self._planned):
            if request.finish_reason is not None:
                continue  # aborted while the step ran
            if index in result.failures:
                emissions.append(self._fail(request, result.failures[index]))
                continue
            emitted = result.tokens[index]
            prompt_logprobs = result.prompt_logprobs.get(index) if result.prompt_logprobs else None
            if prompt_logprobs:
                request.num_prompt_logprobs += len(prompt_logprobs)
            if not emitted:
                request.num_computed += count
                self._name_blocks(request)
                if prompt_logprobs:
                    emissions.append(Emission(request, prompt_logprobs=prompt_logprobs))
                continue
            num_accepted = len(emitted) - 1
            outcomes = (request.thinking_counts if request.thinking else request.answer_counts).outcomes
            outcome = (len(request.drafts), num_accepted)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            request.num_computed = len(request.token_ids) + num_accepted
            tokens, reason = self._append(request, emitted)
            emission = Emission(request, tokens, [True] * num_accepted + [False], prompt_logprobs=prompt_logprobs)
            del emission.accepted[len(tokens) :]
            if result.logprobs and index in result.logprobs:
                emission.logprobs = result.logprobs[index][: len(tokens)]
            emissions.append(emission)
            if request.stop_text is not None:
                emission.text = request.stop_text.add(tokens, reason is not None)
                if request.stop_text.stop is not None:
                    reason, request.stop_reason = "stop", request.stop_text.stop
            if reason is not None:
                request.num_computed = min(request.num_computed, len(request.token_ids) - 1)
                self._name_blocks(request)
                self.finish(request, reason)
                emission.finish_reason, emission.stop_reason = reason, request.stop_reason
                continue
            if request.grammar is not None:
                request.grammar.advance(tokens)
            self._name_blocks(request)
            room = min(
                request.stopping.max_tokens - request.num_output_tokens, self.max_seq_len - len(request.token_ids)
            )
            drafts = result.drafts[index]
            request.drafts = drafts if room > len(drafts) else drafts[: room - 1]
        self._planned = []
        return emissions

    # ------------------------------------------------------------------ parts

    def _fail(self, request: Request, why: str) -> Emission:
        """End a request that has no next token. Latents that are not finite are not found as a prefix again."""
        if why == NOT_FINITE:
            self.blocks.forget(request.blocks)
            failure = GenerationError(why)
        else:
            reason = request.grammar.failure if request.grammar is not None else None
            failure = GenerationError(reason or "the request's bans and grammar together forbid every token", True)
        self.finish(request, "error")
        return Emission(request, finish_reason="error", failure=failure)

    def _prune(self, heap: list) -> None:
        """Drop finished requests once they are the most of a heap: a deadline may be an hour away."""
        if len(heap) > 64 + 2 * (len(self.running) + self.num_waiting):
            heap[:] = [entry for entry in heap if entry[2].finish_reason is None]
            heapq.heapify(heap)

    def _wait(self, request: Request) -> None:
        self._prune(self._waiting)
        heapq.heappush(self._waiting, (-request.priority, request.arrival, request))
        self.num_waiting += 1

    def _next_waiting(self) -> Request:
        while self._waiting[0][2].finish_reason is not None:
            heapq.heappop(self._waiting)
        return self._waiting[0][2]

    def _admit(self, request: Request, budget: int) -> int:
        """Start a waiting request on up to `budget` tokens; how many, or 0 where the cache has no room for it."""
        if request.sampling.prompt_logprobs is None or request.num_prompt_logprobs == request.num_prompt_tokens - 1:
            found, hashes = self.blocks.find_prefix(request.token_ids, request.salt)
        else:
            found, hashes = [], []  # every prompt token must be computed to have a log-probability
        computed = len(found) * self.blocks.block_size
        count = min(len(request.token_ids) - computed, budget)
        needed = self.blocks.blocks_for(computed + count + self.num_lookahead) - len(found)
        fresh = self.blocks.allocate(needed)
        if fresh is None:
            self.blocks.free(found)
            return 0
        heapq.heappop(self._waiting)
        self.num_waiting -= 1
        request.blocks.extend(found)
        request.blocks.extend(fresh)
        request.hashes = hashes
        request.num_computed = computed
        if not request.num_preemptions:
            request.num_cached = computed
            self.prompt_tokens += len(request.token_ids)
            self.cached_tokens += computed
        self._enter_running(request)
        return count

    def _enter_running(self, request: Request) -> None:
        key = (-request.priority, request.arrival)
        index = len(self.running)
        while index and (-self.running[index - 1].priority, self.running[index - 1].arrival) > key:
            index -= 1
        self.running.insert(index, request)

    def _reserve(self, request: Request, count: int) -> bool:
        """Blocks for `count` more tokens, preempting from the end of `running`; False when `request` itself went."""
        blocks = self.blocks
        needed = blocks.blocks_for(request.num_computed + count + self.num_lookahead) - len(request.blocks)
        if needed <= 0:
            return True
        while (fresh := blocks.allocate(needed)) is None:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        request.blocks.extend(fresh)
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.blocks.free(request.blocks)
        del request.blocks[:]
        request.hashes = []
        request.num_computed = 0
        request.drafts = []
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._wait(request)

    def _row(self, request: Request, count: int) -> PlanRow:
        start, known = request.num_computed, len(request.token_ids)
        end = start + count
        if start == known - 1:  # decoding: the newest token, then drafts
            tokens = [request.token_ids[-1], *request.drafts]
            if count < len(tokens):
                request.drafts = request.drafts[: count - 1]
                tokens = tokens[:count]
        else:
            tokens = request.token_ids[start:end]
            request.drafts = []
        sample = end >= known
        row = PlanRow(
            tokens,
            start,
            request.blocks,
            len(request.drafts),
            sample,
            -1 if sample else request.token_ids[end],
            request.sampling,
            request.relaxed_topk,
            request.relaxed_delta if request.thinking else 0.0,
        )
        if not request.simple and sample:
            row = row._replace(
                history=request.token_ids if request.sampling.penalized else (),
                num_prompt_tokens=request.num_prompt_tokens,
                banned=request.banned(),
                masks=request.grammar.masks(request.drafts) if request.grammar else None,
            )
        if request.sampling.prompt_logprobs is not None:
            skip = max(0, request.num_prompt_logprobs - start)  # delivered before a preemption
            targets = request.token_ids[start + skip + 1 : min(end + 1, request.num_prompt_tokens)]
            row = row._replace(prompt_skip=skip, prompt_targets=targets)
        return row

    def _append(self, request: Request, tokens: list[int]) -> tuple[list[int], str | None]:
        """Append emitted tokens up to a stop; those appended, and why the request ends, if it does."""
        stopping, ids = request.stopping, request.token_ids
        limit = min(request.num_prompt_tokens + stopping.max_tokens, self.max_seq_len)
        if len(ids) + len(tokens) < limit and request.watched.isdisjoint(tokens):
            ids += tokens
            return tokens, None
        think = self.think_ids
        for index, token in enumerate(tokens):
            ids.append(token)
            if think is not None:
                if token == think[0]:
                    request.thinking = True
                elif token == think[1]:
                    request.thinking = False
            if token in stopping.stop_ids and request.num_output_tokens > stopping.min_tokens:
                request.stop_reason = None if token in stopping.eos_ids else token
                return tokens[: index + 1], "stop"
            if len(ids) >= limit:
                return tokens[: index + 1], "length"
        return tokens, None

    def _name_blocks(self, request: Request) -> None:
        """Register the blocks that have become full, with the tokens behind them that their content depends on."""
        manager = self.blocks
        full = request.num_computed // manager.block_size
        if full <= len(request.hashes) or not manager.enable_reuse:
            return
        for index in range(len(request.hashes), full):
            previous = request.hashes[-1] if request.hashes else manager.first_hash(request.salt)
            name = manager.next_hash(previous, request.token_ids, index)
            request.hashes.append(name)
            manager.register(request.blocks[index], name)
