"""From a prompt and SamplingParams to the engine's requests: defaults filled in, words turned to token ids."""

import random
import time
from collections.abc import Sequence

from deepseek_fp4_plugin.config import SamplingParams, SchedulingParams, SpeculativeConfig
from deepseek_fp4_plugin.engine.async_engine import RequestHandle
from deepseek_fp4_plugin.engine.output import CompletionOutput, RequestOutput, StopStrings
from deepseek_fp4_plugin.engine.request import Request, RequestError, Stopping, check_length
from deepseek_fp4_plugin.engine.step_plan import Sampling
from deepseek_fp4_plugin.tokenizer import IncrementalDetokenizer, Tokenizer

MAX_ANSWERS = 128  # `n`: more would let one call fill every queue
MAX_LOGPROBS = 64


class Admission:
    """Makes requests. default_max_tokens: for requests that do not say.  seed: of the seeds of unseeded requests."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        max_request_tokens: int,
        default_max_tokens: int | None,
        speculative: SpeculativeConfig | None,
        seed: int,
    ):
        self.tokenizer, self.vocab_size, self.max_request_tokens = tokenizer, vocab_size, max_request_tokens
        self.default_max_tokens, self.speculative = default_max_tokens, speculative
        self._random = random.Random(seed)
        self._next_id = 0

    def handle(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        streaming: bool,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str | None = None,
        scheduling: SchedulingParams | None = None,
    ) -> RequestHandle:
        """One prompt's request, as many sequences as `n` says. Raises RequestError or ValueError for a bad one."""
        text, ids = self._prompt(prompt, params)
        n = params.n
        if n > MAX_ANSWERS:
            raise RequestError(f"n={n} is more than {MAX_ANSWERS} answers")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > MAX_LOGPROBS:
                raise RequestError(f"{name}={getattr(params, name)} is more than {MAX_LOGPROBS}")
        if timeout is not None and not timeout > 0:
            raise RequestError(f"timeout={timeout} is not a positive number of seconds")
        seed = params.seed if params.seed is not None else self._random.getrandbits(63)
        stopping = self._stopping(params, len(ids))
        relaxed_topk, relaxed_delta = self._relaxed(params)
        scheduling = scheduling or SchedulingParams()
        requests, detokenizers = [], []
        output = RequestOutput(self._next_id, text, list(ids), [CompletionOutput(index=i) for i in range(n)])
        for index in range(n):
            detokenizer = stop_text = None
            if self.tokenizer is not None and params.detokenize:
                detokenizer = IncrementalDetokenizer(self.tokenizer, params.skip_special_tokens)
                if params.stop:
                    stop_text = self._stop_strings(detokenizer, params, ids)
            elif params.stop:
                raise RequestError("stop strings need a tokenizer and detokenize=True; use stop_token_ids")
            requests.append(
                Request(
                    self._next_id,
                    list(ids),
                    self._sampling(params, seed + index, first=index == 0),
                    stopping,
                    priority=priority,
                    deadline=None if timeout is None else time.monotonic() + timeout,
                    salt=cache_salt,
                    relaxed_topk=relaxed_topk,
                    relaxed_delta=relaxed_delta,
                    bad_words=self._bad_words(params),
                    stop_text=stop_text,
                    grammar=self._grammar(params, ids),
                    dp_rank=scheduling.attention_dp_rank,
                    dp_relax=scheduling.attention_dp_relax,
                )
            )
            detokenizers.append(detokenizer)
            self._next_id += 1
        return RequestHandle(output, requests, detokenizers, streaming, params.include_stop_str_in_output)

    def check_length(self, text: str) -> None:
        """Raises RequestError for a prompt that cannot fit, however it is tokenized. Any thread."""
        check_length(self.tokenizer, text, self.max_request_tokens)

    def _prompt(self, prompt: str | Sequence[int], params: SamplingParams) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("this LLM has no tokenizer; give the prompt as token ids")
            if params.truncate_prompt_tokens is None:
                self.check_length(prompt)
            text, ids = prompt, self.tokenizer.encode(prompt, add_special_tokens=params.add_special_tokens)
        else:
            if params.truncate_prompt_tokens is None:
                check_length(self.tokenizer, prompt, self.max_request_tokens)
            text, ids = None, list(prompt)
            if not all(isinstance(token, int) for token in ids):
                raise RequestError("a prompt is a string or a list of token ids (integers)")
        if params.truncate_prompt_tokens is not None:
            ids = ids[-params.truncate_prompt_tokens :]
        return text, ids

    def _stopping(self, params: SamplingParams, prompt_tokens: int) -> Stopping:
        maximum = params.max_tokens if "max_tokens" in params.model_fields_set else self.default_max_tokens
        if maximum is None:
            maximum = max(1, self.max_request_tokens - prompt_tokens)
        eos = frozenset(() if params.ignore_eos else self._eos_ids(params))
        own = frozenset(params.stop_token_ids or ())
        if params.min_tokens and params.min_tokens > maximum:
            raise RequestError(f"min_tokens={params.min_tokens} is more than max_tokens={maximum}")
        return Stopping(maximum, eos | own, eos - own, params.min_tokens or 0)

    def _stop_strings(
        self, detokenizer: IncrementalDetokenizer, params: SamplingParams, prompt: list[int]
    ) -> StopStrings:
        assert self.tokenizer is not None
        stops, include = params.stop or (), params.include_stop_str_in_output
        start, end = self.tokenizer.think_start_id, self.tokenizer.think_end_id
        if params.stop_in_thinking or start is None or end is None:
            return StopStrings(detokenizer, stops, include)
        last = next((token for token in reversed(prompt) if token in (start, end)), end)
        return StopStrings(detokenizer, stops, include, (start, end), thinking=last == start)

    def _eos_ids(self, params: SamplingParams) -> Sequence[int]:
        if params.end_id is not None:
            return (params.end_id,)
        return self.tokenizer.eos_ids if self.tokenizer else ()

    def _sampling(self, params: SamplingParams, seed: int, first: bool) -> Sampling:
        for token in params.logit_bias or {}:
            self._in_vocabulary(token, "logit_bias")
        return Sampling(
            greedy=params.greedy,
            temperature=1.0 if params.temperature is None else params.temperature,
            top_k=params.top_k or 0,
            top_p=1.0 if params.top_p is None else params.top_p,
            min_p=params.min_p or 0.0,
            repetition_penalty=1.0 if params.repetition_penalty is None else params.repetition_penalty,
            presence_penalty=params.presence_penalty or 0.0,
            frequency_penalty=params.frequency_penalty or 0.0,
            logit_bias=tuple((params.logit_bias or {}).items()),
            seed=seed % 2**64,
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs if first else None,
        )

    def _relaxed(self, params: SamplingParams) -> tuple[int, float]:
        """(top-k, delta) inside the thinking phase; (1, 0) is strict."""
        config = self.speculative
        if config is None:
            return 1, 0.0

        def choose(own, default):
            return default if own is None else own

        use = choose(params.use_relaxed_acceptance_for_thinking, config.use_relaxed_acceptance_for_thinking)
        topk = choose(params.relaxed_topk, config.relaxed_topk)
        delta = choose(params.relaxed_delta, config.relaxed_delta)
        return (topk, delta) if use else (1, 0.0)

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        words: list[tuple[int, ...]] = [(token,) for token in params.bad_token_ids or ()]
        for token in params.bad_token_ids or ():
            self._in_vocabulary(token, "bad_token_ids")
        for word in params.bad or ():
            if self.tokenizer is None:
                raise RequestError("bad words need a tokenizer; use bad_token_ids")
            # With and without a blank in front, because most vocabularies join it to the word.
            spellings = {tuple(self.tokenizer.encode(text, add_special_tokens=False)) for text in (word, f" {word}")}
            words += [spelling for spelling in sorted(spellings) if spelling]
        return tuple(words)

    def _grammar(self, params: SamplingParams, prompt: list[int]):
        if params.guided_decoding is None:
            return None
        if self.tokenizer is None:
            raise RequestError("structured output needs a tokenizer")
        from deepseek_fp4_plugin.engine.grammar import compile_grammar, thinking_after

        return compile_grammar(
            self.tokenizer, params.guided_decoding, self.vocab_size, thinking_after(prompt, self.tokenizer)
        )

    def _in_vocabulary(self, token: int, field: str) -> None:
        if not 0 <= token < self.vocab_size:
            raise RequestError(f"{field} has token id {token}, outside the vocabulary of {self.vocab_size}")
