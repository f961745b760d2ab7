"""What crosses between the scheduler and the ranks that compute: plain, picklable data; no Request, no tensor."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Sampling(NamedTuple):
    """How one request's tokens are chosen; fixed for its life, so a plan's rows share it by reference."""

    greedy: bool = True
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: int | None = None  # this many best tokens beside the chosen one
    prompt_logprobs: int | None = None

    @property
    def penalized(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class Setup(NamedTuple):
    """A request enters a slot: what the rank must know of it beside its tokens and blocks."""

    start: int  # first position to compute; what lies before was found in the cache
    sampling: Sampling
    relaxed_topk: int = 1  # 1: strict verification
    relaxed_delta: float = 0.0  # inside the thinking phase, which think_ids begin and end
    thinking: bool = False
    think_ids: tuple[int, int] = (-1, -1)

    @property
    def relaxed(self) -> bool:
        return self.relaxed_topk > 1 and self.relaxed_delta > 0


class PlanRow(NamedTuple):
    """One request's share of a step.

    A chunk computes `tokens` from position `start` on. Decoding (`tokens` is empty) computes the newest token and the
    first `num_drafts` drafts of the slot: the rank has them, and where they lie, from its last step, perhaps before the
    scheduler does; `start` is then the last position at which the newest token may be.

    Where `sample` is set, the rows of the last known token and of every draft are sampled; elsewhere (a prompt chunk
    that does not reach the end) `next_token` is the known token behind the chunk, which the MTP module needs.
    """

    slot: int
    tokens: Sequence[int]
    start: int
    num_drafts: int
    sample: bool
    next_token: int = -1
    new_blocks: tuple[int, ...] = ()  # the request's blocks behind those that the slot has
    setup: Setup | None = None  # with a request's first row in a slot
    history: Sequence[int] = ()  # prompt, output and drafts, for penalties only
    num_prompt_tokens: int = 0
    banned: tuple[tuple[int, ...], ...] = ()  # token ids that each sampled row must not give
    masks: np.ndarray | None = None  # int32 [num_drafts + 1, ceil(vocab / 32)], a set bit allows its token
    prompt_skip: int = 0
    prompt_targets: Sequence[int] = ()  # known tokens behind tokens[prompt_skip:], whose log-probabilities are wanted

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) or 1 + self.num_drafts


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One rank's share of a step.

    uniform: every row decodes with all of its drafts, and chooses its tokens by what its slot knows alone.
    With attention data parallelism all ranks step together, and the engine tells each of all of them:
    dp_tokens: tokens that each rank computes.  dp_sampled: rows that each rank samples.  dp_uniform: all are uniform.
    """

    rows: list[PlanRow]
    num_tokens: int
    uniform: bool = False
    dp_tokens: tuple[int, ...] = ()
    dp_sampled: tuple[int, ...] = ()
    dp_uniform: bool = False


class Logprob(NamedTuple):
    """Natural logarithm of a token's probability under the model, and its rank (1 is the most probable)."""

    logprob: float
    rank: int


# Why a row has no token.
NOT_FINITE = "its logits are not finite"
NOTHING_ALLOWED = "every token is forbidden"

TokenLogprobs = dict[int, Logprob]  # the chosen token first, then the best ones


@dataclass(slots=True)
class StepResult:
    """Row by row of the plan."""

    tokens: list[list[int]]  # emitted: accepted drafts and one more; empty where nothing was sampled
    drafts: list[list[int]]  # proposed for the next step
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # row -> one a emitted token
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # row -> one a prompt target
    failures: dict[int, str] = field(
        default_factory=dict
    )  # row -> NOT_FINITE or NOTHING_ALLOWED; no token of it counts
    expert_load: dict[int, list[int]] | None = None  # layer -> tokens that chose each expert so far, where counted
    forward_seconds: float = 0.0
    sample_seconds: float = 0.0
    draft_seconds: float = 0.0
