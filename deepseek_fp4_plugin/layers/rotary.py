"""YaRN rotary frequencies. Source: arXiv 2309.00071; numbers checked in SPEC terms by tests/unit/test_rotary.py."""

import math

import torch
from torch import Tensor


def inverse_frequencies(dim: int, theta: float, yarn=None) -> Tensor:
    """FP32 [dim / 2].

    yarn: None, or an object with factor, original_max_position_embeddings, beta_fast, beta_slow and truncate.
    Frequencies that turn more than beta_fast times over the original context stay, those below beta_slow turns are
    divided by `factor`, and a linear ramp over the pair index lies between.
    """
    base = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if yarn is None:
        return base

    def pair_with_turns(turns: float) -> float:
        length = yarn.original_max_position_embeddings
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with_turns(yarn.beta_fast), pair_with_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001  # transformers' guard against a ramp without width
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return base * ((1 - ramp) + ramp / yarn.factor)
