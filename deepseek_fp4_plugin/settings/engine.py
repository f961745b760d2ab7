"""An engine and its model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, Strict

from deepseek_fp4_plugin.settings.choices import (
    ANY,
    Bool,
    Choices,
    Count,
    Flag,
    Int,
    Seconds,
    did_you_mean,
    differ,
    refuse,
)
from deepseek_fp4_plugin.settings.device import CudaGraphConfig, KvCacheConfig, MoeConfig
from deepseek_fp4_plugin.settings.files import merge, nest, read_settings
from deepseek_fp4_plugin.settings.parallel import AttentionDpConfig, check_sizes
from deepseek_fp4_plugin.settings.speculative import SpeculativeConfig

# Flat keys: (the nested object, its field).
FLAT = {
    "kv_cache_dtype": ("kv_cache_config", "dtype"),
    "kv_cache_free_gpu_memory_fraction": ("kv_cache_config", "free_gpu_memory_fraction"),
    "free_gpu_memory_fraction": ("kv_cache_config", "free_gpu_memory_fraction"),
    "cuda_graph_padding_enabled": ("cuda_graph_config", "enable_padding"),
    "cuda_graph_batch_sizes": ("cuda_graph_config", "batch_sizes"),
    "cuda_graph_max_batch_size": ("cuda_graph_config", "max_batch_size"),
    "moe_backend": ("moe_config", "backend"),
}


# Upstream settings that nothing reads, each with the values that ask for nothing, and why another one changes nothing.
UNREAD = {
    "enable_chunked_prefill": ((True,), "prompts are always taken in pieces"),
    "enable_overlap_scheduler": ((True,), "it is on where it helps; disable_overlap_scheduler turns it off"),
    "print_iter_log": ((False,), "steps are not printed; a server's /iteration_stats has them"),
    "num_postprocess_workers": ((0,), "text is made in the process that serves it"),
    "gpus_per_node": ((), "orchestrator_type says where ranks run"),
    "attn_backend": ((), "a device has one kind of attention"),
    "sampler_type": (("auto",), "there is one sampler"),
    "guided_decoding_backend": (("llguidance",), "grammars are llguidance's"),
}


class EngineConfig(Choices):
    """An engine and its model.

    model: a folder, a Hugging Face id, or `r1_nano`.  tokenizer: another folder's.  load_format: dummy makes random
    weights, of the model that the folder's config.json and hf_quant_config.json describe, to measure with.  dtype: of
    activations and decoded weights; auto is BF16.  device: auto takes a GPU where there is one.  nvfp4_activations:
    what NVFP4 layers multiply by; auto is fp4 where the device has FP4 tensor cores, else bf16; int8 (numerics/int8.py)
    is for CPUs, fp8 (numerics/fp8_rows.py) for Hopper GPUs, which round so only the rows of long prompts and of many
    requests.  max_batch_size, max_num_tokens: requests and tokens in one step.  max_seq_len: prompt and answer; None
    is the model's own.  max_new_tokens: of requests that do not say; None: as many as the context holds.
    stream_interval: steps between two pieces of a stream.  max_prompt_seconds: that prompt tokens may add to a step,
    by how long the last steps took; None: as long as max_num_tokens take.  disable_overlap_scheduler: on a GPU, await
    each step before the next is planned.  warm_up: before the first request, compile kernels, record decode steps and
    measure what steps need beside weights and cache; None: on a GPU.  seed: of the seeds of requests that bring none.
    orchestrator_type: who starts the ranks; None: this process (torchrun, where that has started it).
    """

    model: str = "r1_nano"
    tokenizer: Annotated[str | None, Flag("Another folder's tokenizer.", metavar="FOLDER")] = None
    load_format: Literal["auto", "dummy"] = "auto"
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], Flag("Of activations; auto: BF16.")] = "auto"
    device: Annotated[
        str,
        Strict(),
        Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$"),
        Flag("cpu, cuda or cuda:N; left out, a GPU where there is one.", metavar="NAME"),
    ] = "auto"
    nvfp4_activations: Annotated[
        Literal["auto", "bf16", "fp4", "fp8", "int8"],
        Flag(
            "What NVFP4 weights are multiplied by; auto: fp4 where there are FP4 tensor cores, else bf16. fp8: Hopper "
            "GPUs, long prompts. int8: CPUs."
        ),
    ] = "auto"
    tensor_parallel_size: Annotated[Count, Flag("Ranks that share the model, each a process [1].")] = 1
    moe_expert_parallel_size: Annotated[Count | None, Flag("Ranks that the routed experts are dealt to.")] = None
    moe_tensor_parallel_size: Annotated[Count | None, Flag("Ranks that each routed expert is cut over.")] = None
    enable_attention_dp: Annotated[Bool, Flag("Each rank serves requests of its own.")] = False
    attention_dp_config: AttentionDpConfig = AttentionDpConfig()
    orchestrator_type: Annotated[
        Literal["spawn", "ray", "torchrun"] | None, Flag("Who starts the ranks; left out, this program.")
    ] = None
    max_batch_size: Annotated[Count, Flag("Requests in one step.")] = 2048
    max_num_tokens: Annotated[Count, Flag("Tokens in one step.")] = 8192
    max_prompt_seconds: Annotated[
        Seconds | None, Flag("Seconds that prompts may add to a step [0.25].", metavar="S", serve_only=True)
    ] = 0.25
    max_seq_len: Annotated[Count | None, Flag("Tokens of prompt and answer; left out, the model's own.")] = None
    max_new_tokens: Count | None = 32
    kv_cache_config: KvCacheConfig = KvCacheConfig()
    cuda_graph_config: CudaGraphConfig | None = CudaGraphConfig()
    moe_config: MoeConfig = MoeConfig()
    speculative_config: SpeculativeConfig | None = None
    stream_interval: Annotated[
        Count, Flag("Steps between two pieces of a stream [1, more where streams are many].", serve_only=True)
    ] = 1
    disable_overlap_scheduler: Bool = False
    warm_up: Annotated[
        Bool | None, Flag("Before the first request, compile kernels and record decode steps [on a GPU].")
    ] = None
    seed: Annotated[Int, Field(ge=0)] = 0

    aliases: ClassVar[Mapping[str, str]] = {
        "tp_size": "tensor_parallel_size",
        "ep_size": "moe_expert_parallel_size",
    }
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "backend": ("pytorch",),
        "trust_remote_code": (ANY,),  # no code of a checkpoint is ever run
        "enable_chunked_prefill": (ANY,),  # prompts are always taken in pieces of max_num_tokens
        "enable_overlap_scheduler": (ANY,),
        "print_iter_log": (ANY,),
        "num_postprocess_workers": (ANY,),
        "gpus_per_node": (ANY,),
        "attn_backend": (ANY,),
        "sampler_type": (ANY,),
        "guided_decoding_backend": (ANY,),
        "tokenizer_mode": ("auto", "fast"),
        "skip_tokenizer_init": (False,),
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

    _unread: dict[str, Any] = PrivateAttr(default_factory=dict)  # of UNREAD, those given

    def __init__(self, **values: Any):
        super().__init__(**values)
        self._unread = _unread(values)
        check_sizes(self.tensor_parallel_size, self.moe_expert_parallel_size, self.moe_tensor_parallel_size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EngineConfig) and dict(self) == dict(other)

    @classmethod
    def canonical(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        values = dict(values)
        old = values.pop("pytorch_backend_config", None)
        if old is not None:
            if not isinstance(old, Mapping):
                refuse("EngineConfig: pytorch_backend_config must be a mapping of settings")
            for name, value in old.items():
                if differ(values.setdefault(name, value), value):
                    refuse(f"EngineConfig: {name} is given twice, once inside pytorch_backend_config; give one")
        if "use_cuda_graph" in values:
            use = values.pop("use_cuda_graph")
            if not isinstance(use, bool):
                refuse(f"EngineConfig: use_cuda_graph={use!r} must be true or false")
            if not use and values.get("cuda_graph_config") is not None:
                refuse("EngineConfig: use_cuda_graph is false, but cuda_graph_config is given; give one")
            if not use:
                values = {k: v for k, v in values.items() if FLAT.get(k, ("",))[0] != "cuda_graph_config"}
                values["cuda_graph_config"] = None
            elif values.setdefault("cuda_graph_config", {}) is None:
                refuse("EngineConfig: use_cuda_graph is true, but cuda_graph_config is null; give one")
        for name in [name for name in values if name in FLAT]:
            nest(values, name, *FLAT[name])
        known = {name: None for name in FLAT} | {"use_cuda_graph": None, "pytorch_backend_config": None}
        for name in values:
            if name not in cls.model_fields and name not in cls.aliases and name not in cls.neutral:
                every = [*cls.model_fields, *cls.aliases, *cls.neutral, *known]
                refuse(f"EngineConfig has no setting {name!r}{did_you_mean(name, every)}")
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
        values = read_settings(path)
        try:
            merged = merge(cls.canonical(values), cls.canonical(overrides))
            config = cls(**merged)
            config._unread = _unread(values) | _unread(overrides)
            return config
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def resolved_device(self) -> str:
        """`device`, with auto replaced by cuda where there is one, else cpu."""
        if self.device != "auto":
            return self.device
        import torch  # here, so that choosing needs no torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def expert_ranks(self) -> int:
        """Ranks that the routed experts are dealt to."""
        if self.moe_expert_parallel_size is not None:
            return self.moe_expert_parallel_size
        return self.tensor_parallel_size // (self.moe_tensor_parallel_size or self.tensor_parallel_size)

    def ignored_settings(self, device: str) -> list[str]:
        """One line for each setting given that means nothing on `device` ("cpu" or "cuda")."""
        lines = [f"{name}={value} ignored: {UNREAD[name][1]}" for name, value in self._unread.items()]
        if self.enable_attention_dp and self.tensor_parallel_size == 1:
            lines.append("enable_attention_dp=True ignored: there is one rank; tensor_parallel_size says how many")
        if "attention_dp_config" in self.model_fields_set and not self.enable_attention_dp:
            lines.append("attention_dp_config ignored: enable_attention_dp is not set")
        if "moe_config" in self.model_fields_set and self.moe_config.backend != "AUTO":
            why = "it names GPU kernels, and this is a CPU" if device == "cpu" else "there is one kernel family here"
            lines.append(f"moe_backend={self.moe_config.backend} ignored: {why}")
        if self.moe_config.load_balancer is not None and self.expert_ranks == 1:
            lines.append("moe_config.load_balancer ignored: moe_expert_parallel_size says how many ranks share experts")
        if device != "cpu":
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


def _unread(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among `values` that ask for something and that nothing reads."""
    inner = values.get("pytorch_backend_config")
    given = {**(inner if isinstance(inner, Mapping) else {}), **values}
    return {name: given[name] for name, (nothing, _) in UNREAD.items() if given.get(name) not in (None, *nothing)}
