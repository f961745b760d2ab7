"""What a device's memory and kernels are used for: the latent cache, captured steps, the experts' kernels."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from deepseek_fp4_plugin.settings.choices import ANY, Bool, Choices, Count, Flag, Int, Share, refuse


class KvCacheConfig(Choices):
    """The paged latent cache.

    free_gpu_memory_fraction: of the GPU memory left after loading.  max_tokens: a limit beside it; the smaller wins.
    dtype auto: what the checkpoint's kv_cache_quant_algo says.  enable_block_reuse: share equal prompt prefixes.
    """

    free_gpu_memory_fraction: Annotated[Share, Flag("Share of the free GPU memory that the latent cache takes.")] = 0.9
    max_tokens: Count | None = None
    enable_block_reuse: Bool = True
    dtype: Annotated[Literal["auto", "bf16", "fp8"], Flag("Of the latent cache.")] = "auto"
    tokens_per_block: Count = 32

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "host_cache_size": (0,),
        "enable_partial_reuse": (ANY,),
        "copy_on_partial_reuse": (ANY,),
        "event_buffer_max_size": (0,),
        "max_gpu_total_bytes": (0,),
    }

    def __init__(self, **values: Any):
        if values.get("dtype") == "bfloat16":
            values["dtype"] = "bf16"
        super().__init__(**values)


class CudaGraphConfig(Choices):
    """Decoding steps captured as CUDA graphs, so many requests each.

    batch_sizes: those numbers; None: 1, 2, 4, 8 and every eighth to 128, then powers of two, up to max_batch_size.
    max_batch_size: the largest of them, 0 for 128; the engine's own limits both.  enable_padding: a step of another
    number is filled up to the next; else it is not captured, and the sizes left to choose are 1 to 32, 64, 128, ...
    """

    batch_sizes: tuple[Count, ...] | None = None
    max_batch_size: Annotated[Int, Field(ge=0)] = 0
    enable_padding: Bool = True

    def __init__(self, **values: Any):
        super().__init__(**values)
        if self.batch_sizes and self.max_batch_size and self.max_batch_size != max(self.batch_sizes):
            refuse(
                f"CudaGraphConfig: max_batch_size={self.max_batch_size} is not the largest of "
                f"batch_sizes={list(self.batch_sizes)}; give one of the two"
            )


class MoeLoadBalancerConfig(Choices):
    """Hot experts held by several expert-parallel ranks. load_file: JSON, layer -> tokens of each expert, as
    `count_load` counts them.  num_slots: experts that all ranks hold together, at least the model's own number.
    """

    load_file: str
    num_slots: Count


class MoeConfig(Choices):
    """The routed experts. backend: TensorRT-LLM's name for a kernel family; it only matters on a GPU.

    count_load: count the tokens that choose each expert, for statistics and metrics.  load_balancer: where experts
    are; without one every expert is held once.
    """

    count_load: Bool = False
    load_balancer: MoeLoadBalancerConfig | None = None
    backend: Literal[
        "AUTO", "CUTLASS", "CUTEDSL", "TRTLLM", "DEEPGEMM", "DENSEGEMM", "WIDEEP", "VANILLA", "TRITON", "MARLIN"
    ] = "AUTO"

    def __init__(self, **values: Any):
        if isinstance(values.get("backend"), str):
            values["backend"] = values["backend"].upper()
        super().__init__(**values)
