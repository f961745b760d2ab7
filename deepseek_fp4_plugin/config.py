"""Everything a caller chooses: SamplingParams for a request, EngineConfig for an engine.

Names, defaults and checks are TensorRT-LLM's, so that its users' code and YAML files work here; the flat keys of
mid-2025 files (`use_cuda_graph`, `moe_backend`, `kv_cache_dtype`) are aliases of today's nested ones. Objects are
frozen. A name that is not known, or a value out of range, is refused with one sentence (ValueError).
"""

import difflib
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn

import yaml
from pydantic import AllowInfNan, BaseModel, ConfigDict, Field, Strict, ValidationError

# Strict: a misplaced "32" or True is a mistake, not a number.
Int = Annotated[int, Strict()]
Real = Annotated[float, Strict(), AllowInfNan(False)]
Bool = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), Field(min_length=1)]
_MOST = 2**31 - 1  # what fits the 32-bit counts of kernels and time-outs; more is a slip of the keyboard
Count = Annotated[Int, Field(ge=1, le=_MOST)]
TokenId = Annotated[Int, Field(ge=0, le=_MOST)]
Penalty = Annotated[Real, Field(ge=-1e6, le=1e6)]  # logits are FP32: beyond, they would not stay finite
Share = Annotated[Real, Field(gt=0, le=1)]

_COLD = 1e-6  # logits divided by less than this would leave FP32's range
_ANY = object()  # in a table of upstream names: every value is taken, and none changes anything here


class Choices(BaseModel):
    """A frozen set of named choices. Subclasses say which other names they take for their fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    aliases: ClassVar[Mapping[str, str]] = {}
    # Upstream names without a counterpart here, and the values that ask for nothing.
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def __init__(self, **values: Any):
        values = self.canonical(values)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(_sentence(type(self).__name__, error)) from None

    @classmethod
    def canonical(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values under the fields' own names. Raises ValueError for a name that is not known or given twice."""
        result: dict[str, Any] = {}
        for name, value in values.items():
            field = cls.aliases.get(name, name)
            if name in cls.neutral:
                accepted = cls.neutral[name]
                if accepted != (_ANY,) and value is not None and value not in accepted:
                    raise ValueError(f"{cls.__name__}: {name}={value!r} is not offered here; leave {name} out")
            elif field not in cls.model_fields:
                known = [*cls.model_fields, *cls.aliases, *cls.neutral]
                raise ValueError(f"{cls.__name__} has no setting {name!r}{did_you_mean(name, known)}")
            elif field in result and _differ(result[field], value):
                given = next(other for other in values if cls.aliases.get(other, other) == field)
                raise ValueError(
                    f"{cls.__name__}: {given}={result[field]!r} and {name}={value!r} are the same setting; give one"
                )
            else:
                result[field] = value
        return result


def _differ(one: Any, other: Any) -> bool:
    return one is not other and one != other  # a NaN is the same setting as itself


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _sentence(owner: str, error: ValidationError) -> str:
    """The first mistake as one sentence."""
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    if first["type"] == "value_error":  # a check of ours, or a nested object's whole sentence
        return str(context["error"])
    path = [str(part) for part in first["loc"] if not str(part).startswith(("function-", "is-instance", "tuple["))]
    where, value = ".".join(path), first["input"]
    if first["type"] == "missing":
        return f"{owner}: {where} is missing"
    rules = {
        "greater_than": "above {gt:g}",
        "greater_than_equal": "at least {ge:g}",
        "less_than": "below {lt:g}",
        "less_than_equal": "at most {le}",
        "finite_number": "a finite number",
        "int_type": "an integer",
        "int_from_float": "an integer",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "a text",
        "string_pattern_mismatch": "auto, cpu, cuda or cuda:0",  # device alone has a pattern
        "string_too_short": "a text that is not empty",
        "literal_error": "one of {expected}",
        "model_type": "a mapping of settings",
        "tuple_type": "a list",
        "too_short": "a list that is not empty",
    }
    rule = rules.get(first["type"])
    should = f"must be {rule.format(**context)}" if rule else f"is refused: {first['msg'].lower()}"
    shown = repr(value)
    return f"{owner}: {where}={shown if len(shown) <= 60 else shown[:57] + '...'} {should}"


def _refuse(sentence: str) -> NoReturn:
    raise ValueError(sentence)


@dataclass(frozen=True)
class GuidedDecodingParams:
    """The form an answer must have; at most one of the fields is set.

    json: a JSON schema, as text or mapping.  grammar: EBNF.  choice: the texts to choose from.
    json_object: any JSON object.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: tuple[str, ...] | list[str] | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "grammar", "choice") if getattr(self, name) is not None]
        given += ["json_object"] if self.json_object else []
        if len(given) > 1:
            raise ValueError(f"GuidedDecodingParams: {' and '.join(given)} cannot both decide the form; give one")


class SamplingParams(Choices):
    """How one request's tokens are chosen and when it ends. Keyword arguments only.

    Greedy unless temperature, top_p, top_k or min_p asks for sampling; temperature 0 (below 1e-6), top_k 1 and top_p 0
    are greedy.

    max_tokens: at most so many new tokens; None: as many as the context holds; not given: the LLM's `max_new_tokens`.
    end_id: ends the text in place of the tokenizer's end-of-text ids.  stop: texts that end it, left out of the output
    unless include_stop_str_in_output.  bad: words never to be written.  top_k 0: all tokens.  seed: of this request's
    random numbers.  logprobs, prompt_logprobs: this many best tokens beside the chosen one.  truncate_prompt_tokens:
    keep so many tokens at the prompt's end.  The last three: this request's own relaxed acceptance of drafted tokens
    inside the thinking phase; None takes the engine's.
    """

    max_tokens: Count | None = 32
    temperature: Annotated[Real, Field(ge=0)] | None = None
    top_p: Annotated[Real, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=0, le=_MOST)] | None = None
    min_p: Annotated[Real, Field(ge=0, le=1)] | None = None
    n: Count = 1
    best_of: Count | None = None
    seed: Annotated[Int, Field(ge=0)] | None = None
    end_id: TokenId | None = None
    stop: tuple[Text, ...] | None = None
    stop_token_ids: tuple[TokenId, ...] | None = None
    include_stop_str_in_output: Bool = False
    ignore_eos: Bool = False
    min_tokens: Annotated[Int, Field(ge=0, le=_MOST)] | None = None
    bad: tuple[Text, ...] | None = None
    bad_token_ids: tuple[TokenId, ...] | None = None
    repetition_penalty: Annotated[Real, Field(gt=0, le=1e6)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[TokenId, Annotated[Real, Field(ge=-1e30, le=1e30)]] | None = None
    logprobs: Annotated[Int, Field(ge=0, le=_MOST)] | None = None
    prompt_logprobs: Annotated[Int, Field(ge=0, le=_MOST)] | None = None
    guided_decoding: GuidedDecodingParams | None = None
    detokenize: Bool = True
    add_special_tokens: Bool = True
    skip_special_tokens: Bool = True
    truncate_prompt_tokens: Count | None = None
    use_relaxed_acceptance_for_thinking: Bool | None = None
    relaxed_topk: Count | None = None
    relaxed_delta: Annotated[Real, Field(ge=0)] | None = None

    aliases: ClassVar[Mapping[str, str]] = {"max_new_tokens": "max_tokens", "bad_words": "bad"}
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "pad_id": (_ANY,),  # nothing is padded
        "spaces_between_special_tokens": (True,),  # byte-level tokens bring their own blanks
        "use_beam_search": (False,),
        "beam_width_array": (),
        "beam_search_diversity_rate": (),
        "length_penalty": (1.0,),
        "early_stopping": (0, 1, False),
        "no_repeat_ngram_size": (),
        "top_p_min": (0.0,),
        "top_p_reset_ids": (),
        "top_p_decay": (1.0,),
        "embedding_bias": (),
        "logits_processor": (),
        "logits_processors": (),
        "allowed_token_ids": (),
        "structured_outputs": (),
        "return_context_logits": (False,),
        "return_generation_logits": (False,),
        "return_encoder_output": (False,),
        "exclude_input_from_output": (True,),
    }

    def __init__(self, **values: Any):
        values = self.canonical(values)
        for name in ("stop", "bad"):
            if isinstance(values.get(name), str):
                values[name] = (values[name],)
        super().__init__(**values)
        self._check()

    def _check(self) -> None:
        if self.best_of is not None and self.best_of != self.n:
            _refuse(f"SamplingParams: best_of={self.best_of} is not n={self.n}; answers are not ranked, leave it out")
        if self.n > 1 and self.greedy:
            _refuse(f"SamplingParams: n={self.n} greedy answers would all be the same; set a temperature above 0")
        limit = self.max_tokens if "max_tokens" in self.model_fields_set else None
        if limit is not None and (self.min_tokens or 0) > limit:
            _refuse(f"SamplingParams: min_tokens={self.min_tokens} is more than max_tokens={limit}")
        if self.repetition_penalty is not None and self.repetition_penalty < 1e-6:
            _refuse(f"SamplingParams: repetition_penalty={self.repetition_penalty} must be at least 1e-06")
        if not self.detokenize and self.stop:
            _refuse("SamplingParams: stop texts need detokenize=True; use stop_token_ids")

    @property
    def greedy(self) -> bool:
        """The most probable token is taken at every step."""
        unset = self.temperature is None and self.top_p is None and self.top_k is None and not self.min_p
        cold = self.temperature is not None and self.temperature < _COLD
        return unset or cold or self.top_k == 1 or self.top_p == 0

    @classmethod
    def from_any(cls, given: Any) -> "SamplingParams":
        """`given` itself, or what another package's object says through attributes of the same names.

        An attribute that is None, empty, or has the default's value counts as not given. Raises TypeError for an
        object that has none of them, ValueError for one that asks for what is not offered.
        """
        if isinstance(given, cls):
            return given
        names = [*cls.model_fields, *cls.aliases, *cls.neutral]
        found = {name: getattr(given, name) for name in names if hasattr(given, name)}
        if isinstance(given, type) or not {"max_tokens", "max_new_tokens"} & found.keys():
            raise TypeError(f"sampling_params is a {type(given).__name__}; give SamplingParams")
        if found.get("top_k") == -1:
            found["top_k"] = 0  # another spelling of "all"
        values = {}
        for name, value in found.items():
            field = cls.model_fields.get(cls.aliases.get(name, name))
            empty = value is None or (isinstance(value, Sized) and len(value) == 0)
            if (empty and name != "max_tokens") or (field is not None and value == field.default):
                continue
            values[name] = value
        if "max_new_tokens" in values and values.get("max_tokens", 0) is None:
            del values["max_tokens"]
        return cls(**values)


class SchedulingParams(Choices):
    """Where one request is served, under attention data parallelism.

    attention_dp_rank: the rank that shall serve it; None: the one with least to do.  attention_dp_relax: another one,
    where that rank is full.
    """

    attention_dp_rank: Annotated[Int, Field(ge=0)] | None = None
    attention_dp_relax: Bool = False


class SpeculativeConfig(Choices):
    """Speculative decoding with the checkpoint's multi-token-prediction (MTP) layer.

    num_nextn_predict_layers: drafts a step, all from the one MTP layer.  Relaxed acceptance: inside the thinking phase
    a draft also passes when it is among the relaxed_topk most probable tokens and its probability is at least the
    highest minus relaxed_delta; the output is then no longer exactly the target model's.
    """

    decoding_type: Literal["MTP"] = "MTP"
    num_nextn_predict_layers: Annotated[Int, Field(ge=1, le=64)] = 1
    use_relaxed_acceptance_for_thinking: Bool = False
    relaxed_topk: Count = 1
    relaxed_delta: Annotated[Real, Field(ge=0)] = 0.0

    aliases: ClassVar[Mapping[str, str]] = {"max_draft_len": "num_nextn_predict_layers"}
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "use_mtp_vanilla": (False,),
        "mtp_eagle_one_model": (_ANY,),
        "speculative_model": (),
    }

    def __init__(self, **values: Any):
        if isinstance(values.get("decoding_type"), str):
            values["decoding_type"] = values["decoding_type"].upper()
        super().__init__(**values)


class KvCacheConfig(Choices):
    """The paged latent cache.

    free_gpu_memory_fraction: of the GPU memory left after loading.  max_tokens: a limit beside it; the smaller wins.
    dtype auto: what the checkpoint's kv_cache_quant_algo says.  enable_block_reuse: share equal prompt prefixes.
    """

    free_gpu_memory_fraction: Share = 0.9
    max_tokens: Count | None = None
    enable_block_reuse: Bool = True
    dtype: Literal["auto", "bf16", "fp8"] = "auto"
    tokens_per_block: Count = 32

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "host_cache_size": (0,),
        "enable_partial_reuse": (_ANY,),
        "copy_on_partial_reuse": (_ANY,),
        "event_buffer_max_size": (0,),
        "max_gpu_total_bytes": (0,),
    }

    def __init__(self, **values: Any):
        if values.get("dtype") == "bfloat16":
            values["dtype"] = "bf16"
        super().__init__(**values)


class CudaGraphConfig(Choices):
    """Captured decoding steps. batch_sizes: those captured; max_batch_size: the largest, 0 for the default."""

    batch_sizes: tuple[Count, ...] | None = None
    max_batch_size: Annotated[Int, Field(ge=0)] = 0
    enable_padding: Bool = False

    def __init__(self, **values: Any):
        super().__init__(**values)
        if self.batch_sizes and self.max_batch_size and self.max_batch_size != max(self.batch_sizes):
            _refuse(
                f"CudaGraphConfig: max_batch_size={self.max_batch_size} is not the largest of "
                f"batch_sizes={list(self.batch_sizes)}; give one of the two"
            )


class MoeConfig(Choices):
    """The routed experts. backend: TensorRT-LLM's name for a kernel family; it only matters on a GPU."""

    backend: Literal[
        "AUTO", "CUTLASS", "CUTEDSL", "TRTLLM", "DEEPGEMM", "DENSEGEMM", "WIDEEP", "VANILLA", "TRITON", "MARLIN"
    ] = "AUTO"

    def __init__(self, **values: Any):
        if isinstance(values.get("backend"), str):
            values["backend"] = values["backend"].upper()
        super().__init__(**values)


class AttentionDpConfig(Choices):
    """Waiting of attention-data-parallel ranks for each other; times in engine iterations."""

    enable_balance: Bool = False
    timeout_iters: Annotated[Int, Field(ge=0)] = 50
    batching_wait_iters: Annotated[Int, Field(ge=0)] = 10


# Flat keys: (the nested object, its field).
_NESTED = {
    "kv_cache_dtype": ("kv_cache_config", "dtype"),
    "kv_cache_free_gpu_memory_fraction": ("kv_cache_config", "free_gpu_memory_fraction"),
    "free_gpu_memory_fraction": ("kv_cache_config", "free_gpu_memory_fraction"),
    "cuda_graph_padding_enabled": ("cuda_graph_config", "enable_padding"),
    "cuda_graph_batch_sizes": ("cuda_graph_config", "batch_sizes"),
    "cuda_graph_max_batch_size": ("cuda_graph_config", "max_batch_size"),
    "moe_backend": ("moe_config", "backend"),
}


class EngineConfig(Choices):
    """An engine and its model.

    model: a folder, a Hugging Face id, or `r1_nano`.  tokenizer: another folder's.  dtype: of activations and decoded
    weights; auto is BF16.  device: auto takes a GPU where there is one.  nvfp4_activations: what NVFP4 layers multiply
    by; auto is fp4 where the device has FP4 tensor cores, else bf16.  max_batch_size, max_num_tokens: requests and
    tokens in one step.  max_seq_len: prompt and answer; None is the model's own.  max_new_tokens: of requests that do
    not say; None: as many as the context holds.  stream_interval: steps between two pieces of a stream.  seed: of the
    seeds of requests that bring none.  orchestrator_type: who starts the ranks; None: this process (torchrun, where
    that has started it).
    """

    model: str = "r1_nano"
    tokenizer: str | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    device: Annotated[str, Strict(), Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    nvfp4_activations: Literal["auto", "bf16", "fp4"] = "auto"
    tensor_parallel_size: Count = 1
    moe_expert_parallel_size: Count | None = None
    moe_tensor_parallel_size: Count | None = None
    enable_attention_dp: Bool = False
    attention_dp_config: AttentionDpConfig = AttentionDpConfig()
    orchestrator_type: Literal["spawn", "ray", "torchrun"] | None = None
    max_batch_size: Count = 2048
    max_num_tokens: Count = 8192
    max_seq_len: Count | None = None
    max_new_tokens: Count | None = 32
    kv_cache_config: KvCacheConfig = KvCacheConfig()
    cuda_graph_config: CudaGraphConfig | None = CudaGraphConfig()
    moe_config: MoeConfig = MoeConfig()
    speculative_config: SpeculativeConfig | None = None
    stream_interval: Count = 1
    seed: Annotated[Int, Field(ge=0)] = 0

    aliases: ClassVar[Mapping[str, str]] = {
        "tp_size": "tensor_parallel_size",
        "ep_size": "moe_expert_parallel_size",
    }
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "backend": ("pytorch",),
        "trust_remote_code": (_ANY,),  # no code of a checkpoint is ever run
        "enable_chunked_prefill": (_ANY,),  # prompts are always taken in pieces of max_num_tokens
        "disable_overlap_scheduler": (_ANY,),
        "enable_overlap_scheduler": (_ANY,),
        "print_iter_log": (_ANY,),
        "num_postprocess_workers": (_ANY,),
        "gpus_per_node": (_ANY,),
        "attn_backend": (_ANY,),
        "sampler_type": (_ANY,),
        "guided_decoding_backend": (_ANY,),
        "tokenizer_mode": ("auto", "fast"),
        "skip_tokenizer_init": (False,),
        "load_format": ("auto",),
        "max_beam_width": (1,),
        "pipeline_parallel_size": (1,),
        "pp_size": (1,),
        "context_parallel_size": (1,),
        "cp_size": (1,),
        "moe_cluster_parallel_size": (1,),
        "cluster_size": (1,),
        "enable_lm_head_tp_in_adp": (False,),
        "force_dynamic_quantization": (False,),
    }

    def __init__(self, **values: Any):
        super().__init__(**values)
        pair = (self.moe_expert_parallel_size, self.moe_tensor_parallel_size)
        for name, size in zip(("moe_expert_parallel_size", "moe_tensor_parallel_size"), pair, strict=True):
            if size and self.tensor_parallel_size % size:
                _refuse(
                    f"EngineConfig: {name}={size} does not divide tensor_parallel_size={self.tensor_parallel_size}; "
                    "the experts are spread over the same ranks"
                )
        if all(pair) and (pair[0] or 1) * (pair[1] or 1) != self.tensor_parallel_size:
            _refuse(
                f"EngineConfig: moe_expert_parallel_size={pair[0]} times moe_tensor_parallel_size={pair[1]} is not "
                f"tensor_parallel_size={self.tensor_parallel_size}; leave one out"
            )

    @classmethod
    def canonical(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        values = dict(values)
        old = values.pop("pytorch_backend_config", None)
        if old is not None:
            if not isinstance(old, Mapping):
                _refuse("EngineConfig: pytorch_backend_config must be a mapping of settings")
            for name, value in old.items():
                if _differ(values.setdefault(name, value), value):
                    _refuse(f"EngineConfig: {name} is given twice, once inside pytorch_backend_config; give one")
        if "use_cuda_graph" in values:
            use = values.pop("use_cuda_graph")
            if not isinstance(use, bool):
                _refuse(f"EngineConfig: use_cuda_graph={use!r} must be true or false")
            if not use and values.get("cuda_graph_config") is not None:
                _refuse("EngineConfig: use_cuda_graph is false, but cuda_graph_config is given; give one")
            if not use:
                values = {k: v for k, v in values.items() if _NESTED.get(k, ("",))[0] != "cuda_graph_config"}
                values["cuda_graph_config"] = None
            elif values.setdefault("cuda_graph_config", {}) is None:
                _refuse("EngineConfig: use_cuda_graph is true, but cuda_graph_config is null; give one")
        for name in [name for name in values if name in _NESTED]:
            _nest(values, name)
        known = {name: None for name in _NESTED} | {"use_cuda_graph": None, "pytorch_backend_config": None}
        for name in values:
            if name not in cls.model_fields and name not in cls.aliases and name not in cls.neutral:
                every = [*cls.model_fields, *cls.aliases, *cls.neutral, *known]
                _refuse(f"EngineConfig has no setting {name!r}{did_you_mean(name, every)}")
        return super().canonical(values)

    @classmethod
    def from_kwargs(cls, model: str = "r1_nano", **values: Any) -> "EngineConfig":
        """The configuration of LLM's keyword arguments, flat or nested. Raises ValueError for a wrong one."""
        return cls(model=model, **values)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "EngineConfig":
        """The configuration of a YAML file. `overrides` (the command line) win over the file, setting by setting.

        Raises ValueError naming the file when it cannot be read or holds a wrong setting.
        """
        path = Path(path)
        try:
            values = yaml.load(path.read_text(encoding="utf-8"), _NoDuplicates)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise ValueError(f"the configuration file {path} cannot be read: {reason}") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f" at line {mark.line + 1}" if mark else ""
            if isinstance(error, _Duplicate):
                raise ValueError(f"the configuration file {path} has {error.problem} twice, again{line}") from None
            raise ValueError(f"the configuration file {path} is not YAML{line}") from None
        except (RecursionError, ValueError) as error:  # too deep; a date or a number that is none
            raise ValueError(f"the configuration file {path} is not YAML: {error}") from None
        if values is None:
            values = {}
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise ValueError(f"the configuration file {path} must hold settings, one `name: value` a line")
        try:
            merged = _merge(cls.canonical(values), cls.canonical(overrides))
            return cls(**merged)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def resolved_device(self) -> str:
        """`device`, with auto replaced by cuda where there is one, else cpu."""
        if self.device != "auto":
            return self.device
        import torch  # here, so that choosing needs no torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def ignored_settings(self, device: str) -> list[str]:
        """One line for each setting given that means nothing on `device` ("cpu" or "cuda")."""
        lines = []
        if self.enable_attention_dp and self.tensor_parallel_size == 1:
            lines.append("enable_attention_dp=True ignored: there is one rank; tensor_parallel_size says how many")
        if "attention_dp_config" in self.model_fields_set and not self.enable_attention_dp:
            lines.append("attention_dp_config ignored: enable_attention_dp is not set")
        if "moe_config" in self.model_fields_set and self.moe_config.backend != "AUTO":
            why = "it names GPU kernels, and this is a CPU" if device == "cpu" else "there is one kernel family here"
            lines.append(f"moe_backend={self.moe_config.backend} ignored: {why}")
        graphs = self.cuda_graph_config
        if device != "cpu":
            if "cuda_graph_config" in self.model_fields_set and graphs is None:
                lines.append("use_cuda_graph=False ignored: short decode steps are always captured on a GPU")
            named = ", ".join(sorted(graphs.model_fields_set)) if graphs is not None else ""
            if named:
                lines.append(f"cuda_graph_config: {named} ignored: steps are captured in the sizes that come")
            return lines
        if "cuda_graph_config" in self.model_fields_set and self.cuda_graph_config is not None:
            lines.append("use_cuda_graph (cuda_graph_config) ignored: CUDA graphs need a GPU")
        if "free_gpu_memory_fraction" in self.kv_cache_config.model_fields_set:
            fraction = self.kv_cache_config.free_gpu_memory_fraction
            lines.append(
                f"free_gpu_memory_fraction={fraction} ignored: there is no GPU memory; "
                "kv_cache_config.max_tokens limits a CPU's cache"
            )
        return lines


class _Duplicate(yaml.constructor.ConstructorError):
    """A key that a mapping has twice; YAML's own reader lets the last one win."""


class _NoDuplicates(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag != "tag:yaml.org,2002:merge":
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, str) and key in seen:
                    raise _Duplicate(None, None, key, key_node.start_mark)
                seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


def _nest(values: dict[str, Any], name: str) -> None:
    """Move the flat setting `name` into its object. Raises ValueError where the object says otherwise."""
    value = values.pop(name)
    outer, inner = _NESTED[name]
    held = values.get(outer)
    if isinstance(held, Choices):
        held = held.model_dump(exclude_unset=True)
    if held is not None and not isinstance(held, Mapping):
        _refuse(f"EngineConfig: {outer}={held!r} must be a mapping of settings")
    held = dict(held or {})
    if _differ(held.setdefault(inner, value), value):
        _refuse(f"EngineConfig: {name}={value!r} and {outer}.{inner}={held[inner]!r} are the same setting; give one")
    values[outer] = held


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, nested objects field by field."""
    merged = dict(below)
    for name, value in above.items():
        if isinstance(value, Choices):
            value = value.model_dump(exclude_unset=True)
        held = merged.get(name)
        merged[name] = _merge(held, value) if isinstance(held, dict) and isinstance(value, dict) else value
    return merged
