"""What goes into a kernel's weight preparation, the opaque thing that comes out, and the contract of who makes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels.spans import Spans
from deepseek_fp4_plugin.numerics.nvfp4 import NVFP4Tensor

Activations = Literal["bf16", "fp4", "fp8", "int8"]
OptionalTensor = Any  # a Tensor; None where the weight's format has none, which `format` says


@dataclass(frozen=True)
class WeightTensors:
    """One projection as the checkpoint stores it, possibly a slice, possibly stacked over experts (leading axis E).

    weight: [(E,) out, in] PLAIN or FP8_BLOCK, uint8 [(E,) out, in / 2] NVFP4.
    scale: FP8_BLOCK weight_scale_inv [(E,) out / block, in / block]; NVFP4 weight_scale E4M3 [(E,) out, in / 16].
    scale_2: NVFP4 weight_scale_2, FP32 [] or [E].  input_scale: FP32 [] or None (weight-only checkpoints).
    fp8_block: rows and columns of a scale block; smaller than 128 when a slice cuts through blocks.
    """

    format: WeightFormat
    weight: Tensor
    scale: OptionalTensor = None
    scale_2: OptionalTensor = None
    input_scale: OptionalTensor = None
    fp8_block: tuple[int, int] = (128, 128)

    @property
    def out_features(self) -> int:
        return self.weight.shape[-2]

    @property
    def in_features(self) -> int:
        return self.weight.shape[-1] * (2 if self.format is WeightFormat.NVFP4 else 1)


@dataclass(frozen=True)
class PreparedWeight:
    """A weight in the layout of the backend that will multiply by it; `data` is that backend's own.

    dtype: the activations' dtype.  activations: "fp4" rounds the input to NVFP4 with `input_scale` before multiplying,
    "int8" to 8-bit integers with a scale a block of 16, "fp8" input and weight to E4M3 (numerics/fp8_rows.py): always
    in `reference` and `decoded`, in `cuda` where there are so many rows that it is faster.
    scale_columns: see `Case`.
    """

    backend: "Backend"
    format: WeightFormat
    out_features: int
    in_features: int
    dtype: torch.dtype
    activations: Activations
    input_scale: OptionalTensor
    data: Any
    scale_columns: int = 128


@dataclass(frozen=True)
class PreparedRouter:
    """A router in the layout of the backend that will choose by it; `data` is that backend's own.

    bias: FP32 [experts], for the choice only.
    """

    backend: "Backend"
    data: Any
    bias: Tensor


class Case(NamedTuple):
    """What a backend may be asked to serve: a weight, or with `format` None tensors of `dtype`; None is any dtype."""

    device: torch.device
    dtype: torch.dtype | None = None
    format: WeightFormat | None = None
    activations: Activations = "bf16"
    scale_columns: int = 128  # of an FP8 weight


class Backend(Protocol):
    """What a kernel backend must offer: every operation of `kernels.ops`, with these arguments.

    A backend is a module. For an operation that it has no kernel of its own for it takes another's function. Shapes and
    meaning are those of `kernels.ops`; `prepare` returns what the backend wants to find in PreparedWeight.data.
    """

    def prepare(
        self,
        parts: Sequence[WeightTensors],
        dtype: torch.dtype,
        activations: Activations,
        input_scale: OptionalTensor,
        /,
    ) -> Any: ...

    def build_ahead(self, weights: Sequence[PreparedWeight], most_rows: int, /) -> None: ...

    # By a prepared weight.
    def linear(self, x: Tensor, weight: PreparedWeight, expert: int | None = None, /) -> Tensor: ...

    def gated_mlp(self, x: Tensor, gate_up: PreparedWeight, down: PreparedWeight, /) -> Tensor: ...

    def experts_mlp(
        self,
        x: Tensor,
        expert_ids: Tensor,
        expert_weights: Tensor,
        gate_up: PreparedWeight,
        down: PreparedWeight,
        /,
    ) -> Tensor: ...

    def linear_pair(
        self, x: Tensor, first: PreparedWeight, second: PreparedWeight, /
    ) -> tuple[Tensor, Tensor] | None: ...

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, weight: PreparedWeight, /) -> Tensor: ...

    def absorb(self, q_nope: Tensor, kv_b: PreparedWeight, /) -> Tensor: ...

    def absorbed_queries(
        self, q_nope: Tensor, q_rope: Tensor, kv_b: PreparedWeight, cos: Tensor, sin: Tensor, /
    ) -> tuple[Tensor, Tensor]: ...

    def absorb_and_store(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        kv_b: PreparedWeight,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        slots: Tensor,
        kv: Tensor,
        norm: Tensor,
        eps: float,
        /,
    ) -> tuple[Tensor, Tensor]: ...

    def values_from_latent(self, attended: Tensor, kv_b: PreparedWeight, v: int, /) -> Tensor: ...

    def attended_values(
        self,
        q_latent: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        block_tables: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        max_query: int,
        max_context: int,
        scale: float,
        kv_b: PreparedWeight,
        v: int,
        /,
    ) -> Tensor | None: ...

    # By plain tensors.
    def plain_linear(self, x: Tensor, weight: Tensor, /) -> Tensor: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, /) -> Tensor: ...

    def add_rms_norm(
        self, x: Tensor, hidden: Tensor, weight: Tensor, eps: float, other: Tensor | None, /
    ) -> tuple[Tensor, Tensor]: ...

    def add(self, x: Tensor, y: Tensor, /) -> Tensor: ...

    def concat(self, x: Tensor, y: Tensor, /) -> Tensor: ...

    def embedding(self, ids: Tensor, weight: Tensor, /) -> Tensor: ...

    def argmax(self, logits: Tensor, /) -> Tensor: ...

    def step_inputs(
        self, slots: Tensor, starts: Tensor, tokens: Tensor, tables: Tensor, num_blocks: int, block_size: int, /
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...

    def cos_sin(self, positions: Tensor, frequencies: Tensor, magnitude: float, /) -> tuple[Tensor, Tensor]: ...

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, /) -> Tensor: ...

    def local_ids(self, ids: Tensor, slots: Tensor, /) -> Tensor: ...

    def prepare_router(self, weight: Tensor, /) -> Any: ...

    def placed_router(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor,
        slots: Tensor,
        k: int,
        n_group: int,
        topk_group: int,
        normalize: bool,
        scaling: float,
        /,
    ) -> tuple[Tensor, Tensor, Tensor] | None: ...

    def router(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor,
        k: int,
        n_group: int,
        topk_group: int,
        normalize: bool,
        scaling: float,
        /,
    ) -> tuple[Tensor, Tensor]: ...

    def route(
        self,
        logits: Tensor,
        bias: Tensor,
        k: int,
        n_group: int,
        topk_group: int,
        normalize: bool,
        scaling: float,
        /,
    ) -> tuple[Tensor, Tensor]: ...

    def weight_amax(self, weight: Tensor, scale_inv: OptionalTensor, block: tuple[int, int], /) -> Tensor: ...

    def convert_weight(
        self, weight: Tensor, scale_inv: OptionalTensor, block: tuple[int, int], scale_2: Tensor, /
    ) -> tuple[NVFP4Tensor, float, float]: ...

    def latent_entries(self, kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, /) -> Tensor: ...

    def store_entries(self, cache: Tensor, slots: Tensor, entries: Tensor, /) -> None: ...

    def store_latents(
        self, cache: Tensor, slots: Tensor, kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, /
    ) -> Tensor: ...

    def expanded_attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float, spans: Spans, /) -> Tensor: ...

    def absorbed_attention(
        self,
        q_latent: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        block_tables: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        max_query: int,
        max_context: int,
        scale: float,
        /,
    ) -> Tensor: ...
