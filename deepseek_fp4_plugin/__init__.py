"""DeepSeek-R1/V3 in NVFP4: FP8 checkpoint in, calibrated NVFP4 checkpoint out, text out.

from deepseek_fp4_plugin import LLM, SamplingParams
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deepseek_fp4_plugin.config import EngineConfig, GuidedDecodingParams, SamplingParams, SchedulingParams
    from deepseek_fp4_plugin.llm import LLM

_HOMES = {
    "LLM": "deepseek_fp4_plugin.llm",
    "EngineConfig": "deepseek_fp4_plugin.config",
    "GuidedDecodingParams": "deepseek_fp4_plugin.config",
    "SamplingParams": "deepseek_fp4_plugin.config",
    "SchedulingParams": "deepseek_fp4_plugin.config",
}

__all__ = ["LLM", "EngineConfig", "GuidedDecodingParams", "SamplingParams", "SchedulingParams"]


def __getattr__(name: str) -> Any:
    """Import torch only when something that needs it is asked for: `--help` and `--version` stay quick."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
