"""What the operator of a server chooses, beside the engine's configuration."""

import re
from dataclasses import dataclass

import jinja2
import jinja2.meta

from deepseek_fp4_plugin.serving.reasoning import REASONING_PARSERS
from deepseek_fp4_plugin.serving.tool_calls import TOOL_PARSERS

MAX_SECONDS = 2_000_000  # 23 days; the kernel counts a socket's time-out in milliseconds of 31 bits
MAX_COUNT = 2**31 - 1


@dataclass(frozen=True)
class ServerOptions:
    """Every field has a flag of `deepseek-fp4 serve`; docs/serving.md says which."""

    host: str = "localhost"
    port: int = 8000
    served_model_name: tuple[str, ...] = ()  # empty: the model argument, or the folder's name for a local path
    reasoning_parser: str | None = None
    tool_parser: str | None = None
    chat_template: str | None = None  # Jinja text that replaces the tokenizer's
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()  # of browsers; empty: same origin only
    sampling_defaults: str = "model"  # "model": generation_config.json; "openai": temperature 1.0, top_p 1.0
    max_queue: int = 256  # requests waiting beyond the batch before 429
    max_body_bytes: int = 16 << 20
    body_timeout: float = 30.0  # seconds for a request's body to arrive
    request_timeout: float = 3600.0  # seconds for an answer
    stall_timeout: float = 60.0  # seconds that a client may leave its stream unread
    drain_timeout: float = 30.0  # seconds for running answers after SIGTERM
    restart_on_failure: bool = False  # start the engine again when it has stopped
    vllm_metrics: bool = False  # /metrics has vLLM's names too
    log_level: str = "info"

    def __post_init__(self) -> None:
        if self.sampling_defaults not in ("model", "openai"):
            raise ValueError(f"sampling_defaults is {self.sampling_defaults!r}; choose model or openai")
        for name, known in (("reasoning_parser", REASONING_PARSERS), ("tool_parser", TOOL_PARSERS)):
            if getattr(self, name) not in (None, *known):
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose {' or '.join(sorted(known))}")
        if self.chat_template is not None:
            template_variables(self.chat_template)
        if not self.host or self.host != self.host.strip():
            raise ValueError(f"host is {self.host!r}; give a name or an address to listen on")
        for name, least, most in (("port", 0, 65535), ("max_queue", 0, MAX_COUNT), ("max_body_bytes", 1, MAX_COUNT)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(f"{name} is {value}; give a whole number from {least} to {most}")
        for name in ("body_timeout", "request_timeout", "stall_timeout", "drain_timeout"):
            if not 0 < getattr(self, name) <= MAX_SECONDS:  # NaN is not either
                raise ValueError(f"{name} is {getattr(self, name)}; give seconds above 0, at most {MAX_SECONDS}")
        if any(not name.strip() for name in self.served_model_name):
            raise ValueError("served_model_name is empty; give a name")
        for number, key in enumerate(self.api_keys, 1):
            if not key or not all("!" <= character <= "~" for character in key):
                raise ValueError(
                    f"API key {number} has a blank or a character that is not ASCII; no client can send it"
                )
        for origin in self.allowed_origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.\-]*://[^/\s?#]+", origin):
                raise ValueError(f"allowed_origin is {origin!r}; give SCHEME://HOST or SCHEME://HOST:PORT, or *")


def template_variables(source: str) -> set[str]:
    """The variables that a chat template reads. Raises ValueError for one that is wrong."""
    try:
        return jinja2.meta.find_undeclared_variables(
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
        )
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is wrong at line {error.lineno}: {error.message}") from None
