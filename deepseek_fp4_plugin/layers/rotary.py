"""YaRN rotary frequencies. Source: arXiv 2309.00071; numbers checked in SPEC terms by tests/unit/test_rotary.py."""

import math

import torch
from torch import Tensor


def inverse_frequencies(dim: int, theta: float, yarn=None) -> Tensor:
    """FP32 [dim / 2].

    yarn: None, or an object with factor, original_max_position_embeddings, beta_fast and beta_slow. Frequencies that
    turn more than beta_fast times over the original context stay, those below beta_slow turns are divided by `factor`,
    and a linear ramp over the pair index lies between.
    """
    base = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if yarn is None:
        return base

    def pair_with_turns(turns: float) -> float:
        length = yarn.original_max_position_embeddings
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(yarn.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return base * ((1 - ramp) + ramp / yarn.factor)
