"""What the routes do, over one `LLM`: names, prompts, admission, and the jobs."""

import functools
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from starlette.responses import Response

from deepseek_fp4_plugin.config import GuidedDecodingParams, SamplingParams
from deepseek_fp4_plugin.engine.grammar import GrammarError, compile_grammar, enforced_schema
from deepseek_fp4_plugin.llm import LLM, RequestHandle
from deepseek_fp4_plugin.serving import messages_protocol, protocol, responses_protocol
from deepseek_fp4_plugin.serving.admission import Admission
from deepseek_fp4_plugin.serving.answer_form import asked_form, lark_rule
from deepseek_fp4_plugin.serving.api_errors import ApiError, bad_request
from deepseek_fp4_plugin.serving.aside import Aside
from deepseek_fp4_plugin.serving.bodies import SHORT_BODY, Reader
from deepseek_fp4_plugin.serving.call_check import CallCheck
from deepseek_fp4_plugin.serving.chat_prompt import call_arguments, call_grammar, tools_of
from deepseek_fp4_plugin.serving.generation import Answer, Job
from deepseek_fp4_plugin.serving.json_bytes import to_json
from deepseek_fp4_plugin.serving.logprobs import TokenTexts
from deepseek_fp4_plugin.serving.messages import MessagesAnswer
from deepseek_fp4_plugin.serving.messages_protocol import CountTokensRequest, MessagesRequest
from deepseek_fp4_plugin.serving.metrics import Metrics
from deepseek_fp4_plugin.serving.options import ServerOptions
from deepseek_fp4_plugin.serving.preparation import Preparation
from deepseek_fp4_plugin.serving.protocol import ChatCompletionRequest, CompletionRequest, as_chat
from deepseek_fp4_plugin.serving.reasoning import REASONING_PARSERS
from deepseek_fp4_plugin.serving.request_parts import Tool
from deepseek_fp4_plugin.serving.responses import ResponsesAnswer, ResponseStore
from deepseek_fp4_plugin.serving.responses_protocol import ResponsesRequest, as_messages
from deepseek_fp4_plugin.serving.sampling import SamplingDefaults, sampling_params
from deepseek_fp4_plugin.serving.streaming import ChoiceParser
from deepseek_fp4_plugin.serving.tool_calls import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR, TOOL_PARSERS

logger = logging.getLogger(__name__)

# Longer texts, and chats of more parts, are rendered and tokenized beside the event loop.
_SHORT_TEXT, _FEW_PARTS = 4096, 16


def _is_long(parts: Sequence[Any]) -> bool:
    """Whether work on these texts or objects may take longer than streams should wait."""
    if len(parts) > _FEW_PARTS:
        return True
    return sum(_length(part) for part in parts) > _SHORT_TEXT


def _length(part: Any) -> int:
    """Of a text, of token ids, or of an object that is written out."""
    counted = isinstance(part, str) or (isinstance(part, list) and part and isinstance(part[0], int))
    return len(part) if counted else len(str(part))


class Service:
    """One per application. Methods run on the event loop's thread unless they say otherwise."""

    def __init__(self, llm: LLM, options: ServerOptions, model: str, aside: Aside) -> None:
        if llm.tokenizer is None:
            raise ValueError(
                f"{model} has no tokenizer.json, and a server needs one; copy it from the original checkpoint"
            )
        self.llm, self.options, self.tokenizer, self.aside = llm, options, llm.tokenizer, aside
        local = Path(model).name if Path(model).exists() else model
        self.names = options.served_model_name or (local,)
        self.root, self.created = local, int(time.time())  # no path of this machine
        self._noted_system = False
        self.metrics = Metrics(llm.get_stats, self.names[0], options.vllm_metrics)
        self.admission = Admission(llm.config.max_batch_size, options.max_queue, self.metrics)
        self.preparation = Preparation(self.tokenizer, options.chat_template, options.tool_parser, self.names,
                                       llm.vocab_size, llm.max_request_tokens)  # fmt: skip
        self.prompts = self.preparation.prompts
        self.responses = ResponseStore()
        self.reader: Reader | None = None  # of long requests, and of those that go on from long conversations
        self.texts = TokenTexts(self.tokenizer)
        self.defaults = self._sampling_defaults()
        markers = {text: self.tokenizer.token_id(text) for text in
                   (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)}  # fmt: skip
        self.marker_ids = {text: token for text, token in markers.items() if token is not None}

    def _sampling_defaults(self) -> SamplingDefaults:
        config = self.llm.config
        # EngineConfig's own 32 is the Python API's, not a server's.
        limit = config.max_new_tokens if "max_new_tokens" in config.model_fields_set else None
        if self.options.sampling_defaults == "openai":
            return SamplingDefaults(max_tokens=limit)
        advice = self.tokenizer.generation_defaults
        if not advice.get("do_sample", True):
            return SamplingDefaults(temperature=0.0, max_tokens=limit)
        values = {name: advice[name] for name in ("temperature", "top_p", "top_k") if advice.get(name) is not None}
        return SamplingDefaults(**values, max_tokens=limit)

    # ------------------------------------------------------------------ generation

    async def chat(
        self, request: ChatCompletionRequest, log: dict[str, Any], answered: Callable[..., Answer] = Answer
    ) -> Response:
        """answered: makes the response of what Answer's constructor takes."""
        self._begin(request.model, log)
        tools, choice = tools_of(request, self.options.tool_parser)
        form = asked_form(request)
        extra_stops, banned = [], []
        if tools and not request.parallel_tool_calls and CALL_END in self.marker_ids:
            extra_stops.append(self.marker_ids[CALL_END])  # the first call ends the answer
        if request.tools and choice == "none" and CALLS_BEGIN in self.marker_ids:
            banned.append(self.marker_ids[CALLS_BEGIN])
        answer = None
        if tools and form is not None and choice == "auto":
            answer = await self.aside.native(self._answer_rule, *form)
        grammar = None
        if tools:
            rules = tools, choice, request.parallel_tool_calls, self.marker_ids, answer
            grammar = await self.aside.python(call_grammar, *rules)
        params = sampling_params(request, self.defaults, self.vocab_size, grammar, extra_stops, banned)
        if not self._noted_system and any(m.role in ("system", "developer") for m in request.messages):
            self._noted_system = True
            logger.info("a request has a system prompt: accepted, but DeepSeek advises to put all instructions into "
                        "the user's message for R1 models (noted once)")  # fmt: skip
        ids = await self._chat_ids(request, tools)
        try:
            job = await self._start(request, [ids], params, log)
        except ApiError as error:
            if grammar is not None and error.param == "tools":  # which of them was it?
                await self.aside.native(self._check_tools, tools, choice)
            raise
        opened = self._opens_think(ids)

        def parser() -> ChoiceParser:
            # With an empty think block in the prompt all of the text is the answer.
            reasoning = self.options.reasoning_parser if request.reasoning_effort != "none" else None
            calls = self.options.tool_parser if tools else None
            return ChoiceParser(
                REASONING_PARSERS[reasoning](opened) if reasoning else None,
                TOOL_PARSERS[calls]() if calls else None,
                CallCheck(tools).error if calls and choice != "auto" else None,
            )

        think_end = self.tokenizer.think_end_id if self.options.reasoning_parser else None
        return answered(job, request.model, self.texts, self.metrics, self.aside, parser, think_end_id=think_end)

    async def _chat_ids(self, request: ChatCompletionRequest, tools: list[Tool]) -> list[int]:
        """The prompt's tokens. A text that cannot fit is refused before it is tokenized."""
        if request._ready is not None:
            return request._ready[0]
        arguments = (request.messages, tools, request.add_generation_prompt, request.chat_template_kwargs,
                     request.reasoning_effort)  # fmt: skip
        if _is_long([*(message.content for message in request.messages), *tools]):
            text = await self.aside.python(self.prompts.render, *arguments)
        else:
            text = self.prompts.render(*arguments)
        (ids,) = await self._encode([text], request.add_special_tokens, request.truncate_prompt_tokens)
        return ids

    async def _encode(
        self, prompts: list[str] | list[list[int]], add_special_tokens: bool, truncate: int | None
    ) -> list[list[int]]:
        """Tokens of texts that may fit. Raises ApiError for one that cannot."""

        def encode() -> list[list[int]]:
            ids = []
            for prompt in prompts:
                if isinstance(prompt, str):
                    if truncate is None:
                        self.llm.check_length(prompt)
                    prompt = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
                ids.append(prompt)
            return ids

        try:
            return await self.aside.native(encode) if _is_long(prompts) else encode()
        except ValueError as error:
            raise bad_request(str(error)) from None

    async def respond(self, request: ResponsesRequest, log: dict[str, Any]) -> Response:
        """A response: its conversation so far is what it goes on from, and its input."""
        messages: list[dict[str, Any]] = []
        if request.previous_response_id is not None and request._ready is None:
            before = self.responses.conversation(request.previous_response_id)
            if self.reader is not None and len(before) > SHORT_BODY:
                body = json.dumps(request.model_dump(by_alias=True, exclude_unset=True)).encode()
                request = cast(ResponsesRequest, await self.reader.read(body, ResponsesRequest))
            if request._ready is None:
                messages = json.loads(before)
        messages += as_messages(request.input, messages)
        conversation = to_json(messages) if request._ready is None else request._conversation
        answered = functools.partial(ResponsesAnswer, asked=request, conversation=conversation, store=self.responses)
        try:
            chat = await self._chat_of(messages, lambda: responses_protocol.chat_fields(request, messages))
            chat._ready = request._ready
            return await self.chat(chat, log, answered)
        except ApiError as error:
            raise error.renamed(responses_protocol.CHAT_NAMES) from None

    async def message(self, request: MessagesRequest, log: dict[str, Any]) -> Response:
        """A message in Anthropic's form."""
        try:
            chat = await self._chat_of(request.messages, lambda: messages_protocol.chat_fields(request))
            chat._ready = request._ready
            return await self.chat(chat, log, MessagesAnswer)
        except ApiError as error:
            raise error.renamed(messages_protocol.CHAT_NAMES) from None

    async def _chat_of(self, messages: Sequence[Any], fields: Callable[[], dict[str, Any]]) -> ChatCompletionRequest:
        """A request of another form, with these messages, as a chat's."""
        if _is_long(messages):
            return await self.aside.python(lambda: as_chat(fields()))
        return as_chat(fields())

    def count_tokens(self, request: CountTokensRequest) -> dict[str, Any]:
        """Of the prompt that a message would have. Any thread."""
        return self.preparation.count_tokens(request)

    def _answer_rule(self, field: str, form: GuidedDecodingParams) -> str:
        """The Lark rule of an answer beside calls. Raises ApiError where it cannot be enforced. Any thread."""
        try:
            compile_grammar(self.tokenizer, form, self.vocab_size)
            return lark_rule(field, form, enforced_schema(form))
        except GrammarError as error:
            raise bad_request(f"{field}: {error}", field) from None

    def _check_tools(self, tools: list[Tool], choice: Any) -> None:
        """Raises ApiError for the first tool whose parameters cannot be enforced. Any thread."""
        for number, tool in enumerate(tools):
            if choice != "auto" or tool.function.strict:
                param = f"tools.{number}.function.parameters"
                arguments = call_arguments(tool, number)
                if not tool.function.strict:
                    arguments["x-guidance"] = {"lenient": True}
                schema = GuidedDecodingParams(json=arguments, additional_properties=True)
                try:
                    compile_grammar(self.tokenizer, schema, self.vocab_size)
                except GrammarError as error:
                    raise bad_request(f"{param}: {error}", param) from None

    async def complete(self, request: CompletionRequest, log: dict[str, Any]) -> Response:
        self._begin(request.model, log)
        params = sampling_params(request, self.defaults, self.vocab_size)
        given: Any = request.prompt
        prompts: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        ids = request._ready
        if ids is None:
            ids = await self._encode(prompts, request.add_special_tokens, request.truncate_prompt_tokens)
        job = await self._start(request, ids, params, log)
        echoed = None
        if request.echo:
            echoed = [
                prompt if isinstance(prompt, str) and not request.truncate_prompt_tokens
                else self.tokenizer.decode(ids_, skip_special_tokens=request.skip_special_tokens)
                for prompt, ids_ in zip(prompts, [h.output.prompt_token_ids for h in job.handles], strict=True)
            ]  # fmt: skip
        return Answer(job, request.model, self.texts, self.metrics, self.aside, prompt_texts=echoed)

    def _opens_think(self, ids: list[int]) -> bool:
        """Whether the prompt ends inside a think block: a template that writes `<think>` for the model."""
        start, end = self.tokenizer.think_start_id, self.tokenizer.think_end_id
        last = next((token for token in reversed(ids) if token in (start, end)), None)
        return last is not None and last == start

    def _begin(self, model: str, log: dict[str, Any]) -> None:
        log["model"] = model
        self.check_model(model)
        self.check_health()

    async def _start(
        self,
        request: ChatCompletionRequest | CompletionRequest,
        prompts: list[list[int]],
        params: SamplingParams,
        log: dict[str, Any],
    ) -> Job:
        sequences = len(prompts) * request.n
        self.admission.reserve(sequences)
        handles: list[RequestHandle] = []

        def submit() -> None:
            for ids in prompts:
                handles.append(
                    self.llm.generate_async(
                        ids, params, streaming=request.stream, priority=request.priority,
                        timeout=self.options.request_timeout, cache_salt=request.cache_salt,
                    )
                )  # fmt: skip

        try:
            if params.guided_decoding is not None or sum(map(len, prompts)) > _SHORT_TEXT:
                await self.aside.native(submit)
            else:
                submit()
        except BaseException as error:
            for handle in handles:
                handle.abort()
            self.admission.release(sequences)
            if isinstance(error, GrammarError):
                asked = asked_form(request)
                field = asked[0] if asked is not None and asked[1] == params.guided_decoding else "tools"
                raise bad_request(f"{field}: {error}", field) from None
            if isinstance(error, ValueError):
                raise bad_request(str(error)) from None
            if isinstance(error, RuntimeError):
                raise ApiError(503, str(error), "ServiceUnavailableError") from None
            raise

        def release(job: Job) -> None:
            self.admission.jobs.discard(job)
            self.admission.release(sequences)

        job = Job(request, handles, release, log)
        self.admission.jobs.add(job)
        return job

    # ------------------------------------------------------------------ tokens

    def tokenize(self, request: protocol.TokenizeRequest) -> dict[str, Any]:
        """Any thread."""
        return self.preparation.tokenize(request)

    def detokenize(self, request: protocol.DetokenizeRequest) -> dict[str, Any]:
        """Any thread."""
        return self.preparation.detokenize(request)

    # ------------------------------------------------------------------ the server itself

    @property
    def vocab_size(self) -> int:
        return self.llm.vocab_size

    @property
    def max_model_len(self) -> int:
        return self.llm.max_request_tokens

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 for a model that is not served."""
        self.preparation.check_model(name)

    def check_health(self) -> None:
        """Raises ApiError 503 when no request can be answered."""
        if self.admission.draining:
            raise ApiError(503, "the server is shutting down", "ServiceUnavailableError",
                           headers={"Retry-After": "10"})  # fmt: skip
        try:
            self.llm.check_health()
        except RuntimeError as error:
            hope = "; it is being started again" if self.options.restart_on_failure else ""
            raise ApiError(503, f"{error}{hope}", "ServiceUnavailableError") from None

    async def generate_one(self) -> None:
        """One token from the engine, through the queue like any request."""
        self.check_health()
        self.admission.reserve(1)
        try:
            output = await self.llm.generate_async([0], SamplingParams(max_tokens=1, temperature=0.0), timeout=60.0)
        except RuntimeError as error:
            raise ApiError(503, str(error), "ServiceUnavailableError") from None
        finally:
            self.admission.release(1)
        if output.outputs[0].finish_reason not in ("stop", "length"):
            raise ApiError(503, "the engine gave no token within 60 s", "ServiceUnavailableError")

    def model_cards(self) -> list[dict[str, Any]]:
        return [
            {"id": name, "object": "model", "created": self.created, "owned_by": "deepseek_fp4_plugin",
             "root": self.root, "max_model_len": self.max_model_len}
            for name in self.names
        ]  # fmt: skip

    def info(self) -> dict[str, Any]:
        """What the playground needs to know."""
        speculative = self.llm.config.speculative_config
        relaxed = None
        if speculative is not None:
            relaxed = {
                "num_nextn_predict_layers": speculative.num_nextn_predict_layers,
                "relaxed": speculative.use_relaxed_acceptance_for_thinking,
                "relaxed_topk": speculative.relaxed_topk,
                "relaxed_delta": speculative.relaxed_delta,
            }
        return {
            "model": self.names[0],
            "max_model_len": self.max_model_len,
            "sampling_defaults": {"temperature": self.defaults.temperature, "top_p": self.defaults.top_p,
                                  "top_k": self.defaults.top_k},
            "reasoning_parser": self.options.reasoning_parser,
            "tool_parser": self.options.tool_parser,
            "speculative": relaxed,
        }  # fmt: skip

    def iteration_stats(self) -> list[dict[str, Any]]:
        return self.llm.get_iteration_stats()
