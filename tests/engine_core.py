"""The bare engine, token ids in and out, for tests: no tokenizer, no thread."""

import random
from collections import deque
from collections.abc import Iterable, Sequence

import torch

from deepseek_fp4_plugin.engine.block_manager import BlockManager
from deepseek_fp4_plugin.engine.engine import LLMEngine
from deepseek_fp4_plugin.engine.executor import InProcessExecutor
from deepseek_fp4_plugin.engine.kv_cache import allocate
from deepseek_fp4_plugin.engine.model_runner import ModelRunner
from deepseek_fp4_plugin.engine.pace import PromptPace
from deepseek_fp4_plugin.engine.recorded_steps import Sizes
from deepseek_fp4_plugin.engine.request import Request, Stopping
from deepseek_fp4_plugin.engine.scheduler import Scheduler
from deepseek_fp4_plugin.engine.step_plan import Sampling, StepPlan, StepResult
from deepseek_fp4_plugin.engine.worker import WorkerFacts
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM


def make_engine(
    model: DeepseekV3ForCausalLM,
    *,
    drafts: int = 0,
    blocks: int = 1024,
    block_size: int = 8,
    batch: int = 64,
    tokens: int = 512,
    max_seq_len: int = 1024,
    reuse: bool = True,
    cache_dtype: torch.dtype = torch.float32,
    think_ids: tuple[int, int] | None = None,
    oracle: dict[int, Sequence[int]] | None = None,
    overlap: bool = False,
    sizes: Sizes | None = None,
    reads: bool | None = None,
    seconds: float | None = None,
) -> LLMEngine:
    """oracle: request id -> its whole token ids; half of all drafts are then replaced by the truth.

    seconds: that prompts may add to a step; None: as long as `tokens` take.
    """
    layers = model.config.num_hidden_layers + (1 if drafts else 0)
    cache = allocate(model.config, layers, blocks + 1, block_size, cache_dtype, model.model.norm.weight.device)
    cache.fill_(float("nan"))  # a read of a slot nobody wrote shows
    scheduler = Scheduler(
        BlockManager(blocks, block_size, reuse, lookahead=1 if drafts else 0),
        batch,
        tokens,
        max_seq_len,
        drafts,
        think_ids,
        None if seconds is None else PromptPace(seconds, least=5),
    )
    runner = ModelRunner(model, cache, drafts, batch, sizes=sizes, reads=reads)
    facts = WorkerFacts(model.config, None, drafts, max_seq_len, blocks, block_size, overlap, 0, cache.nbytes)
    executor = InProcessExecutor(runner, facts)
    if oracle is not None:
        executor.runner = OracleRunner(runner, scheduler, oracle)
    return LLMEngine([scheduler], executor, model.config.vocab_size, overlap=overlap)


class OracleRunner:
    """Replaces drafts by what a request is known to go on with, some of them spoilt: a random model drafts too badly
    for acceptance and rollback to be exercised."""

    def __init__(self, inner: ModelRunner, scheduler: Scheduler, truth: dict[int, Sequence[int]]):
        self.inner, self.scheduler, self.truth, self.random = inner, scheduler, truth, random.Random(0)
        self._results: deque[StepResult] = deque()

    def submit(self, plan: StepPlan) -> None:
        self.inner.submit(plan)
        result, slots = self.inner.collect(), self.inner.slots
        for index, share in enumerate(self.scheduler._under_way[-1]):
            whole = self.truth.get(share.request.request_id)
            if result.tokens[index] and whole is not None and self.random.random() < 0.8:
                end = int(slots.starts[share.request.slot]) + 1
                drafts = list(whole[end : end + len(result.drafts[index])])
                if drafts and self.random.random() < 0.5:
                    drafts[self.random.randrange(len(drafts))] = 7
                result.drafts[index][: len(drafts)] = drafts
                slots.tokens[share.request.slot, 1 : len(drafts) + 1] = torch.tensor(drafts)
        self._results.append(result)

    def collect(self) -> StepResult:
        return self._results.popleft()


def make_request(
    request_id: int, prompt: Sequence[int], max_tokens: int = 16, sampling: Sampling | None = None, **fields
) -> Request:
    return Request(request_id, list(prompt), sampling or Sampling(), Stopping(max_tokens), **fields)


def run_all(engine: LLMEngine, requests: Iterable[Request], max_steps: int = 100_000) -> dict[int, list[int]]:
    """Serve all; output tokens by request id, the blocks checked at every step."""
    outputs: dict[int, list[int]] = {}
    for request in requests:
        engine.check(request)
        engine.add(request)
        outputs[request.request_id] = []
    for _ in range(max_steps):
        if not engine.has_work:
            break
        for emission in engine.step():
            outputs[emission.request.request_id] += emission.tokens
        engine.schedulers[0].blocks.check([r.blocks for r in engine.schedulers[0].running])
    assert not engine.has_work, "the engine did not finish"
    engine.schedulers[0].blocks.check([])
    return outputs
