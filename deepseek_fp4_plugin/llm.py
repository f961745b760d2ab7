"""LLM: load a checkpoint and generate text. The signature follows TensorRT-LLM's LLM API.

from deepseek_fp4_plugin import LLM, SamplingParams

with LLM(model="r1_nano") as llm:
    for output in llm.generate(["What is 7 + 8?"], SamplingParams(max_tokens=64)):
        print(output.outputs[0].text)
"""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from deepseek_fp4_plugin.checkpoint.hub import resolve
from deepseek_fp4_plugin.config import EngineConfig, SamplingParams, SchedulingParams
from deepseek_fp4_plugin.engine.admission import Admission
from deepseek_fp4_plugin.engine.async_engine import AsyncEngine, EngineDeadError, RequestHandle
from deepseek_fp4_plugin.engine.block_manager import BlockManager
from deepseek_fp4_plugin.engine.distribution import Balance
from deepseek_fp4_plugin.engine.engine import EngineStats, LLMEngine
from deepseek_fp4_plugin.engine.executor import Executor, InProcessExecutor
from deepseek_fp4_plugin.engine.launch import start_executor
from deepseek_fp4_plugin.engine.output import CompletionOutput, RequestOutput
from deepseek_fp4_plugin.engine.pace import PromptPace, least_chunk
from deepseek_fp4_plugin.engine.request import GenerationError, RequestError
from deepseek_fp4_plugin.engine.scheduler import Scheduler
from deepseek_fp4_plugin.engine.step_plan import Logprob
from deepseek_fp4_plugin.engine.worker import Progress, WarmUp, Worker
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.tokenizer import Tokenizer, has_tokenizer

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineDeadError",
    "EngineStats",
    "GenerationError",
    "Logprob",
    "RequestError",
    "RequestHandle",
    "RequestOutput",
]

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model behind an engine of its own.

    model: a folder, a Hugging Face id, `r1_nano`, or a DeepseekV3ForCausalLM.  tokenizer: another folder's, if any.
    config: everything else at once; or give EngineConfig's fields as keyword arguments (TensorRT-LLM's names).
    progress: called with what is being done ("loading", "measuring steps", "warming up"), and parts done and in all.
    Raises CheckpointError for a checkpoint that cannot be used, ValueError for arguments that cannot.
    """

    def __init__(
        self,
        model: str | Path | DeepseekV3ForCausalLM = "r1_nano",
        tokenizer: str | Path | Tokenizer | None = None,
        *,
        config: EngineConfig | None = None,
        progress: Progress | None = None,
        **kwargs: Any,
    ):
        loaded = model if isinstance(model, DeepseekV3ForCausalLM) else None
        name = str(model) if loaded is None else str(loaded.path or "model")
        if config is None:
            config = EngineConfig.from_kwargs(model=name, **kwargs)
        elif kwargs:
            raise ValueError(f"give either config or {', '.join(kwargs)}, not both")
        self.config = config
        device = torch.device(config.resolved_device() if loaded is None else _device_of(loaded))
        for line in config.ignored_settings(device.type):
            logger.warning(line)
        if config.load_format == "dummy":
            logger.warning("load_format=dummy: the weights are random, and so is every answer")
        if loaded is not None and config.tensor_parallel_size > 1:
            logger.warning(
                f"tensor_parallel_size={config.tensor_parallel_size} ignored: the model is an object of this process; "
                "give its folder to have each rank load its slice"
            )
        folder = loaded.path if loaded is not None else resolve(name)
        self.tokenizer = _tokenizer(tokenizer or config.tokenizer, folder)

        def executor(progress: Progress | None = None) -> Executor:
            if loaded is not None:
                return InProcessExecutor.of(Worker(config, loaded, progress=progress))
            assert folder is not None
            return start_executor(config, name, folder, device, progress)

        self._new_executor = executor
        self._changing, self._shut = threading.Lock(), False
        self._piece_rate: float | None = None
        self._start(executor(progress))

    def _start(self, executor: Executor) -> None:
        """An engine over the workers, and what makes its requests."""
        self._executor, config = executor, self.config
        self.model_config, longest = executor.facts.model_config, executor.facts.max_seq_len
        if config.max_seq_len is not None and config.max_seq_len > longest:
            logger.warning(f"max_seq_len={config.max_seq_len} ignored: the model's own is {longest}, and that is used")
        engine = _engine(config, executor, self.tokenizer)
        self._admission = Admission(
            self.tokenizer,
            self.vocab_size,
            engine.max_request_tokens,
            config.max_new_tokens,
            config.speculative_config,
            config.seed,
        )
        self._engine = AsyncEngine(engine, config.stream_interval, self._piece_rate)

    def generate(
        self,
        inputs: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = False,
        *,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str | None = None,
        scheduling_params: SchedulingParams | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Generate for one prompt (text or token ids) or a list of them; one RequestOutput each, in order.

        sampling_params: one for all, or one each.  use_tqdm: show a progress bar.  timeout: seconds for each request.
        Raises ValueError for a request that cannot be served; none is then started. Raises GenerationError when one
        could not be finished (NaN logits), after the others were; its `outputs` are all of them.
        """
        single = isinstance(inputs, str) or (bool(inputs) and isinstance(inputs[0], int))
        prompts = cast("list[Prompt]", [inputs] if single else list(inputs))
        many = isinstance(sampling_params, Sequence)
        if many and len(cast("Sequence", sampling_params)) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts came with {len(sampling_params)} sampling_params")  # type: ignore[arg-type]
        each = list(cast("Sequence", sampling_params)) if many else [sampling_params] * len(prompts)
        handles = [
            self._admission.handle(p, _params(s), False, priority, timeout, cache_salt, scheduling_params)
            for p, s in zip(prompts, each, strict=True)
        ]
        for handle in handles:
            for request in handle.requests:
                self._engine.engine.check(request)
        try:
            for handle in handles:
                self._engine.submit(handle)
            failures = [_failure(handle) for handle in _with_bar(handles, use_tqdm)]
        except BaseException:
            for handle in handles:
                handle.abort()
            raise
        outputs = [handle.output for handle in handles]
        failed = [failure for failure in failures if failure is not None]
        if failed:
            others = f" ({len(failed)} of {len(outputs)} requests failed)" if len(outputs) > 1 else ""
            raised = GenerationError(f"{failed[0]}{others}", failed[0].own_fault)
            raised.outputs = outputs
            raise raised
        return outputs[0] if single else outputs

    def generate_async(
        self,
        inputs: Prompt,
        sampling_params: SamplingParams | None = None,
        streaming: bool = False,
        *,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str | None = None,
        scheduling_params: SchedulingParams | None = None,
    ) -> RequestHandle:
        """Start one request and return at once. Iterate the handle (`for` or `async for`), or take its `.result()`.

        priority: higher is served first.  timeout: seconds until it ends with finish reason "timeout".
        cache_salt: requests share cached prefixes only with those of the same salt.  scheduling_params: which
        attention-data-parallel rank serves it.
        """
        handle = self._admission.handle(
            inputs, _params(sampling_params), streaming, priority, timeout, cache_salt, scheduling_params
        )
        self._engine.submit(handle)
        return handle

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        streaming: bool = False,
        **template_arguments: Any,
    ) -> RequestOutput | RequestHandle:
        """Generate the assistant's next turn; a RequestOutput, or when streaming its handle."""
        if self.tokenizer is None:
            raise ValueError("chat needs a tokenizer")
        ids = self.tokenizer.encode_chat(messages, **template_arguments)
        handle = self.generate_async(ids, sampling_params, streaming)
        return handle if streaming else handle.result()

    def abort(self, handle: RequestHandle) -> None:
        """Stop a request; its output so far is still delivered, with finish reason "cancelled"."""
        handle.abort()

    def limit_pieces(self, per_second: float) -> None:
        """Give the streams of an event loop together no more pieces a second than that, larger ones instead.

        Not their first and last ones, and none comes later than 50 ms (engine/wakes.py). For requests from now on.
        """
        self._piece_rate = self._engine.piece_rate = per_second

    def get_stats(self) -> EngineStats:
        """Counters and times since the engine started."""
        return self._engine.stats()

    def get_iteration_stats(self) -> list[dict[str, Any]]:
        """What each engine step since the last call did, the newest thousand at most. Times in seconds."""
        return self._engine.engine.take_iterations()

    @property
    def vocab_size(self) -> int:
        """Rows of the model's logits; a tokenizer may have fewer tokens."""
        return self.model_config.vocab_size

    @property
    def max_request_tokens(self) -> int:
        """Longest prompt and answer together that one request may have."""
        return self._engine.engine.max_request_tokens

    def check_length(self, text: str) -> None:
        """Raises RequestError for a prompt that is too long however it is tokenized, long before it would be."""
        self._admission.check_length(text)

    def memory_use(self) -> dict[str, int]:
        """Bytes of the weights, of the latent cache and, where they were measured, of what steps need beside them."""
        facts = self._executor.facts
        steps = {"steps": facts.warm_up.bytes} if facts.warm_up is not None and facts.warm_up.bytes else {}
        return {"weights": facts.weight_bytes, "cache": facts.cache_bytes} | steps

    @property
    def kernels(self) -> tuple[str, ...]:
        """Which kernels serve which weights of the first rank, and why: a line each."""
        return self._executor.facts.kernels

    @property
    def warm_up(self) -> WarmUp | None:
        """What the warm-up took, where there was one."""
        return self._executor.facts.warm_up

    def check_health(self) -> None:
        """Raises EngineDeadError when the engine has stopped."""
        self._engine.check_health()

    def restart(self) -> None:
        """Start workers and engine anew, after a failure for instance. What was running ends as by `shutdown`.

        Raises what starting raised; `check_health` then goes on telling of the failure, and it may be tried again.
        """
        with self._changing:
            self._go_on()
            self._engine.close()
            self._executor.close()
            self._start(self._new_executor(self._go_on))

    def _go_on(self, *_: object) -> None:
        """Raises EngineDeadError when `shutdown` was called meanwhile: loading is then cut short."""
        if self._shut:
            raise EngineDeadError("the engine was shut down")

    def shutdown(self) -> None:
        """Cancel what is running, stop the engine's thread and end the workers. The LLM is of no use afterwards."""
        self._shut = True
        with self._changing:
            self._engine.close()
            self._executor.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def _engine(config: EngineConfig, executor: Executor, tokenizer: Tokenizer | None) -> LLMEngine:
    """Schedulers over the cache that the workers have."""
    facts = executor.facts
    think_ids = None
    if tokenizer is not None and tokenizer.think_start_id is not None and tokenizer.think_end_id is not None:
        think_ids = (tokenizer.think_start_id, tokenizer.think_end_id)

    shape = facts.model_config
    least = least_chunk(shape.kv_lora_rank, shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.v_head_dim)

    def scheduler() -> Scheduler:
        reuse, lookahead = config.kv_cache_config.enable_block_reuse, 1 if facts.num_drafts else 0
        return Scheduler(
            BlockManager(facts.cache_blocks, facts.block_size, reuse, lookahead),
            config.max_batch_size,
            config.max_num_tokens,
            facts.max_seq_len,
            facts.num_drafts,
            think_ids,
            None if config.max_prompt_seconds is None else PromptPace(config.max_prompt_seconds, least),
        )

    schedulers = [scheduler() for _ in range(executor.num_schedulers)]
    waits = config.attention_dp_config
    balance = Balance(waits.timeout_iters, waits.batching_wait_iters) if waits.enable_balance else None
    overlap = facts.asynchronous and not config.disable_overlap_scheduler
    return LLMEngine(schedulers, executor, facts.model_config.vocab_size, balance, overlap)


def _tokenizer(given: str | Path | Tokenizer | None, path: Path | None) -> Tokenizer | None:
    if isinstance(given, Tokenizer):
        return given
    folder = Path(given) if given is not None else path
    if folder is None or (given is None and not has_tokenizer(folder)):
        return None
    return Tokenizer.from_folder(folder)


def _params(given: Any) -> SamplingParams:
    return SamplingParams() if given is None else SamplingParams.from_any(given)


def _device_of(model: DeepseekV3ForCausalLM) -> torch.device:
    return model.model.norm.weight.device


def _failure(handle: RequestHandle) -> GenerationError | None:
    """Wait for a request's end; why it failed, if it did."""
    try:
        handle.result()
    except GenerationError as failure:
        return failure
    return None


def _with_bar(handles: list[RequestHandle], show: bool):
    if not show:
        return handles
    from rich.progress import track

    return track(handles, description="generating")
