"""Everything a caller chooses: SamplingParams for a request, EngineConfig for an engine.

Names, defaults and checks are TensorRT-LLM's, so that its users' code and YAML files work here; the flat keys of
mid-2025 files (`use_cuda_graph`, `moe_backend`, `kv_cache_dtype`) are aliases of today's nested ones. Objects are
frozen. A name that is not known, or a value out of range, is refused with one sentence (ValueError).
"""

from deepseek_fp4_plugin.settings.choices import did_you_mean
from deepseek_fp4_plugin.settings.device import CudaGraphConfig, KvCacheConfig, MoeConfig
from deepseek_fp4_plugin.settings.engine import EngineConfig
from deepseek_fp4_plugin.settings.parallel import AttentionDpConfig
from deepseek_fp4_plugin.settings.sampling import GuidedDecodingParams, SamplingParams, SchedulingParams
from deepseek_fp4_plugin.settings.speculative import SpeculativeConfig

__all__ = [
    "AttentionDpConfig",
    "CudaGraphConfig",
    "EngineConfig",
    "GuidedDecodingParams",
    "KvCacheConfig",
    "MoeConfig",
    "SamplingParams",
    "SchedulingParams",
    "SpeculativeConfig",
    "did_you_mean",
]
