"""The attention's products by head, where a checkpoint has kv_b_proj in NVFP4: `decoded`'s, on its values.

humming's layout is its own, so the values are what the product of the unit matrix gives.
"""

from dataclasses import replace

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import decoded
from deepseek_fp4_plugin.kernels.decoded.linear import Decoded
from deepseek_fp4_plugin.kernels.humming.linear import Layers, product
from deepseek_fp4_plugin.kernels.weights import PreparedWeight


def absorb(q_nope: Tensor, kv_b: PreparedWeight) -> Tensor:
    """See kernels/reference/attention.py."""
    return decoded.absorb(q_nope, _decoded(kv_b))


def absorbed_queries(
    q_nope: Tensor, q_rope: Tensor, kv_b: PreparedWeight, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """See kernels/reference/attention.py."""
    return decoded.absorbed_queries(q_nope, q_rope, _decoded(kv_b), cos, sin)


def absorb_and_store(
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
) -> tuple[Tensor, Tensor]:
    """See kernels/reference/attention.py."""
    latents = cache, slots, kv, norm, eps
    return decoded.absorb_and_store(q_nope, q_rope, _decoded(kv_b), cos, sin, *latents)


def values_from_latent(attended: Tensor, kv_b: PreparedWeight, v: int) -> Tensor:
    """See kernels/reference/attention.py."""
    return decoded.values_from_latent(attended, _decoded(kv_b), v)


def _decoded(kv_b: PreparedWeight) -> PreparedWeight:
    """The weight as `decoded` has it.

    Its BF16 values are made at the first call and kept beside the packed ones: 33 MB of a whole R1's layer, 2 GB of 61.
    A warm-up makes them before the cache gets what memory is left, a recorder before it captures.
    """
    layers: Layers = kv_b.data
    if not layers.values:
        assert not torch.cuda.is_current_stream_capturing()  # they would be there after a replay only
        one = torch.eye(kv_b.in_features, dtype=kv_b.dtype, device=layers.parts[0].locks.device)
        layers.values.append(product(one, kv_b).T.contiguous())
    return replace(kv_b, data=Decoded(layers.values[0], None))
