"""The scheduler: which requests compute how many tokens in the next step.

One rule, vLLM's: a request's computed tokens catch up with its tokens (prompt, output, drafts), as far as the step's
budget and the cache go. Prompt chunks, prefix hits, decode, drafts and preempted requests are all that rule.
Running requests come first, by priority and age; when the cache is full the last of them gives its blocks back and
starts over later, so the oldest always advances and nobody starves.

A step may be planned while the one before it is under way: each request then goes on from where it will be, drafts that
are not verified yet count as accepted where blocks are reserved, and a request that turns out to have ended has wasted
one share of one step. Ranks compute steps in the order of their plans, so a block may change hands while a step that
writes it is under way: whoever gets it writes later.
"""

import heapq
import time
from collections import deque

from deepseek_fp4_plugin.engine.block_manager import BlockManager
from deepseek_fp4_plugin.engine.pace import PromptPace
from deepseek_fp4_plugin.engine.request import Emission, GenerationError, Request, Share
from deepseek_fp4_plugin.engine.step_plan import NOT_FINITE, PlanRow, Setup, StepPlan, StepResult


class Scheduler:
    """max_batch_size: running requests.  max_num_tokens: tokens a step.  max_seq_len: prompt + output.

    num_drafts: K, drafts after each step (0: no MTP).  think_ids: (start, end) of the thinking phase, if any.
    pace: how many of a step's tokens may be of prompts; None: all.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_batch_size: int,
        max_num_tokens: int,
        max_seq_len: int,
        num_drafts: int = 0,
        think_ids: tuple[int, int] | None = None,
        pace: PromptPace | None = None,
    ):
        self.blocks, self.pace = blocks, pace
        self.max_batch_size, self.max_num_tokens, self.max_seq_len = max_batch_size, max_num_tokens, max_seq_len
        self.num_drafts, self.think_ids = num_drafts, think_ids
        # The MTP recurrence writes K - 1 positions behind the last draft of a step.
        self.num_lookahead = max(0, num_drafts - 1)
        self.running: list[Request] = []  # in the order they are served
        self._waiting: list[tuple[int, int, Request]] = []  # heap of (-priority, arrival, request)
        self._deadlines: list[tuple[float, int, Request]] = []
        self._under_way: deque[list[Share]] = deque()  # steps planned and not updated, with their rows' shares
        self._slots = list(range(max_batch_size))  # free ones, a heap
        self._short_of_blocks = False  # a request with a share under way could not be planned on
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
        if request in self.running:
            self._leave_running(request)
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

    @property
    def must_wait(self) -> str | None:
        """Why the step under way must be updated before the next is planned; None where nothing forbids it."""
        if not self._under_way:
            return None
        if self._short_of_blocks:
            return "cache"
        return next((why for share in self._under_way[-1] if (why := share.request.looks_back)), None)

    def schedule(self) -> StepPlan:
        """Plan a step. `update` must be called with its result, in the order of the plans, or else `withdraw`."""
        budget = self.max_num_tokens
        prompts = budget if self.pace is None else min(budget, self.pace.allowance)  # of these, for prompts
        rows: list[PlanRow] = []
        shares: list[Share] = []
        preemptions, index = self.num_preemptions, 0
        self._short_of_blocks = False
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            start, count = self._next_tokens(request, budget if request.decoding else min(budget, prompts))
            if count > 0 and not self._reserve(request, start + count):
                if not any(self._under_way):
                    break  # the request itself was the last, and gave way
                self._short_of_blocks = True  # see what that step brings before anybody gives way
                count = 0
            if count > 0:
                rows.append(self._row(request, start, count))
                shares.append(self._share(request, rows[-1]))
                budget -= count
                prompts -= len(rows[-1].tokens)
            index += 1
        admitting = self.num_preemptions == preemptions  # else the victim would take its blocks straight back
        admitting = admitting and not self._short_of_blocks
        prompts = min(prompts, budget)
        while admitting and prompts > 0 and self.num_waiting and len(self.running) < self.max_batch_size:
            request = self._next_waiting()
            count = self._admit(request, prompts)
            if count == 0:
                break
            rows.append(self._row(request, request.num_computed, count))
            shares.append(self._share(request, rows[-1]))
            budget -= count
            prompts -= count
        self._under_way.append(shares)
        return StepPlan(rows, self.max_num_tokens - budget, uniform=all(map(self._is_uniform, shares, rows)))

    def withdraw(self) -> None:
        """Forget the newest plan: it has no rows, and nobody computes it."""
        assert not self._under_way.pop()

    def update(self, result: StepResult) -> list[Emission]:
        """Take the oldest step's result: append tokens, end requests, name full blocks. What each request got."""
        emissions = []
        for index, share in enumerate(self._under_way.popleft()):
            request = share.request
            if request.share is share:
                request.share = None
            if request.finish_reason is not None:
                continue  # it ended while the step ran
            if index in result.failures:
                emissions.append(self._fail(request, result.failures[index]))
                continue
            emitted = result.tokens[index]
            prompt_logprobs = result.prompt_logprobs.get(index) if result.prompt_logprobs else None
            if prompt_logprobs:
                request.num_prompt_logprobs += len(prompt_logprobs)
            if not emitted:
                request.num_computed += share.count
                self._name_blocks(request)
                if prompt_logprobs:
                    emissions.append(Emission(request, prompt_logprobs=prompt_logprobs))
                continue
            room = self._limit(request) - len(request.token_ids)
            num_accepted = min(len(emitted), room) - 1
            outcomes = (request.thinking_counts if request.thinking else request.answer_counts).outcomes
            outcome = (min(share.num_drafts, room - 1), num_accepted)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            request.num_computed = len(request.token_ids) + num_accepted
            tokens, reason = self._append(request, emitted[: num_accepted + 1])
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
            request.drafts = result.drafts[index]
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
        request.slot = heapq.heappop(self._slots)
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

    def _leave_running(self, request: Request) -> None:
        """Blocks and slot return; a share under way is computed for nobody."""
        self.running.remove(request)
        self.blocks.free(request.blocks)
        del request.blocks[:]
        heapq.heappush(self._slots, request.slot)
        request.slot, request.num_sent_blocks, request.decoding, request.share = -1, 0, False, None

    def _limit(self, request: Request) -> int:
        """Tokens with which the request ends."""
        return min(request.num_prompt_tokens + request.stopping.max_tokens, self.max_seq_len)

    def _next_tokens(self, request: Request, budget: int) -> tuple[int, int]:
        """The last position at which the request's next share may begin, and its tokens; 0 where it has none now."""
        share, known = request.share, len(request.token_ids)
        if not request.decoding:
            start = request.num_computed + (share.count if share else 0)
            return start, min(known - start, budget)
        start, drafts = known - 1, len(request.drafts)
        if share is not None:  # every draft under verification may be accepted, and as many will be proposed
            start, drafts = known + share.num_drafts, self.num_drafts
            if known + 1 >= self._limit(request):
                return start, 0  # it ends with that share
        capacity = self.blocks.num_blocks * self.blocks.block_size - self.num_lookahead
        return start, min(1 + drafts, budget, capacity - start)

    def _reserve(self, request: Request, end: int) -> bool:
        """Blocks for tokens up to position `end`, preempting from the end of `running` unless a step is under way;
        False when there are none or `request` itself went."""
        blocks = self.blocks
        needed = blocks.blocks_for(end + self.num_lookahead) - len(request.blocks)
        if needed <= 0:
            return True
        while (fresh := blocks.allocate(needed)) is None:
            if any(self._under_way):
                return False
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        request.blocks.extend(fresh)
        return True

    def _preempt(self, request: Request) -> None:
        self._leave_running(request)
        request.hashes = []
        request.num_computed = 0
        request.drafts = []
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._wait(request)

    def _share(self, request: Request, row: PlanRow) -> Share:
        """The request goes on from behind this row."""
        request.share = Share(request, row.num_tokens, row.num_drafts, row.sample)
        request.decoding = row.sample
        return request.share

    def _is_uniform(self, share: Share, row: PlanRow) -> bool:
        """Any step of such rows is the same but for what slots hold."""
        whole = not row.tokens and row.num_drafts == self.num_drafts
        return whole and share.request.looks_back is None and not share.request.sampling.logit_bias

    def _row(self, request: Request, start: int, count: int) -> PlanRow:
        known, end, sent = len(request.token_ids), start + count, request.num_sent_blocks
        tokens: list[int] = []
        num_drafts, sample, next_token = count - 1, True, -1
        if not request.decoding:
            tokens, num_drafts, sample = request.token_ids[start:end], 0, end >= known
            next_token = -1 if sample else request.token_ids[end]
        new_blocks = tuple(request.blocks[sent:]) if sent < len(request.blocks) else ()
        setup = None if sent else self._setup(request, start)
        request.num_sent_blocks = len(request.blocks)
        row = PlanRow(request.slot, tokens, start, num_drafts, sample, next_token, new_blocks, setup)
        if sample and request.looks_back:
            drafts = request.drafts[:num_drafts]
            row = row._replace(
                history=request.token_ids + drafts if request.sampling.penalized else (),
                num_prompt_tokens=request.num_prompt_tokens,
                banned=request.banned(drafts),
                masks=request.grammar.masks(drafts) if request.grammar else None,
            )
        if request.sampling.prompt_logprobs is not None and tokens:
            skip = max(0, request.num_prompt_logprobs - start)  # delivered before a preemption
            targets = request.token_ids[start + skip + 1 : min(end + 1, request.num_prompt_tokens)]
            row = row._replace(prompt_skip=skip, prompt_targets=targets)
        return row

    def _setup(self, request: Request, start: int) -> Setup:
        if self.think_ids is None:
            return Setup(start, request.sampling)
        relaxed = request.relaxed_topk, request.relaxed_delta
        return Setup(start, request.sampling, *relaxed, request.thinking, self.think_ids)

    def _append(self, request: Request, tokens: list[int]) -> tuple[list[int], str | None]:
        """Append emitted tokens up to a stop; those appended, and why the request ends, if it does."""
        stopping, ids, limit = request.stopping, request.token_ids, self._limit(request)
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
