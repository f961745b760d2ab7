"""A request: how its tokens are chosen, what form they must have, where it is served."""

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from deepseek_fp4_plugin.settings.choices import (
    ANY,
    MOST,
    Bool,
    Choices,
    Count,
    Int,
    Penalty,
    Real,
    Text,
    TokenId,
    refuse,
)

_COLD = 1e-6  # logits divided by less than this would leave FP32's range


@dataclass(frozen=True)
class GuidedDecodingParams:
    """The form an answer must have; at most one of the fields is set.

    json: a JSON schema, as text or mapping.  grammar: EBNF.  choice: the texts to choose from.
    json_object: any JSON object.

    Of JSON: whitespace_pattern is a regular expression for what may stand between two tokens (None: one blank at most;
    "": nothing). additional_properties: allow undeclared properties where the schema does not speak of them.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: tuple[str, ...] | list[str] | None = None
    json_object: bool = False
    whitespace_pattern: str | None = None
    additional_properties: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "grammar", "choice") if getattr(self, name) is not None]
        given += ["json_object"] if self.json_object else []
        if len(given) > 1:
            raise ValueError(f"GuidedDecodingParams: {' and '.join(given)} cannot both decide the form; give one")
        if self.whitespace_pattern is not None and not {"json", "json_object"} & set(given):
            raise ValueError("GuidedDecodingParams: whitespace_pattern is only for an answer in JSON")


class SamplingParams(Choices):
    """How one request's tokens are chosen and when it ends. Keyword arguments only.

    Greedy unless temperature, top_p, top_k or min_p asks for sampling; temperature 0 (below 1e-6), top_k 1 and top_p 0
    are greedy.

    max_tokens: at most so many new tokens; None: as many as the context holds; not given: the LLM's `max_new_tokens`.
    end_id: ends the text in place of the tokenizer's end-of-text ids.  stop: texts that end it, left out of the output
    unless include_stop_str_in_output; without stop_in_thinking they count behind `</think>` only.  bad: words never to
    be written.  top_k 0: all tokens.  seed: of this request's random numbers.  logprobs, prompt_logprobs: this many
    best tokens beside the chosen one.  truncate_prompt_tokens: keep so many tokens at the prompt's end.  The last
    three: this request's own relaxed acceptance of drafted tokens inside the thinking phase; None takes the engine's.
    """

    max_tokens: Count | None = 32
    temperature: Annotated[Real, Field(ge=0)] | None = None
    top_p: Annotated[Real, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=0, le=MOST)] | None = None
    min_p: Annotated[Real, Field(ge=0, le=1)] | None = None
    n: Count = 1
    best_of: Count | None = None
    seed: Annotated[Int, Field(ge=0)] | None = None
    end_id: TokenId | None = None
    stop: tuple[Text, ...] | None = None
    stop_token_ids: tuple[TokenId, ...] | None = None
    include_stop_str_in_output: Bool = False
    stop_in_thinking: Bool = True
    ignore_eos: Bool = False
    min_tokens: Annotated[Int, Field(ge=0, le=MOST)] | None = None
    bad: tuple[Text, ...] | None = None
    bad_token_ids: tuple[TokenId, ...] | None = None
    repetition_penalty: Annotated[Real, Field(gt=0, le=1e6)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[TokenId, Annotated[Real, Field(ge=-1e30, le=1e30)]] | None = None
    logprobs: Annotated[Int, Field(ge=0, le=MOST)] | None = None
    prompt_logprobs: Annotated[Int, Field(ge=0, le=MOST)] | None = None
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
        "pad_id": (ANY,),  # nothing is padded
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
            refuse(f"SamplingParams: best_of={self.best_of} is not n={self.n}; answers are not ranked, leave it out")
        if self.n > 1 and self.greedy:
            refuse(f"SamplingParams: n={self.n} greedy answers would all be the same; set a temperature above 0")
        limit = self.max_tokens if "max_tokens" in self.model_fields_set else None
        if limit is not None and (self.min_tokens or 0) > limit:
            refuse(f"SamplingParams: min_tokens={self.min_tokens} is more than max_tokens={limit}")
        if self.repetition_penalty is not None and self.repetition_penalty < 1e-6:
            refuse(f"SamplingParams: repetition_penalty={self.repetition_penalty} must be at least 1e-06")
        if not self.detokenize and self.stop:
            refuse("SamplingParams: stop texts need detokenize=True; use stop_token_ids")

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
