"""NVFP4 weights on a GPU: tiles that a warp reads with whole-width loads and decodes with few instructions.

Outputs are cut in groups of 16, inputs in slabs of 128; a slab is 1152 bytes, as many as the checkpoint has
for it. Slab by slab along the inputs, group by group along the outputs, both filled up with zeros:

    slab    2 tiles of 64 inputs, 32 lanes, 16 bytes each; then 32 lanes, 4 scale bytes each
    lane    4 g + i holds block i (16 inputs) of the tile for outputs g and g + 8: two words each; its scale bytes are
            (tile 0, g), (tile 0, g + 8), (tile 1, g), (tile 1, g + 8)
    words   a block's two hold 8 pairs of neighbouring values: `_TURNS` says where each bit goes
    scale   5 exponent and 3 mantissa bits, 2^(e - 16) * (1 + m / 8): E4M3 without subnormal numbers. A block whose
            scale is zero has zero codes instead.

Gate and up fused into one weight take turns: a group is 8 outputs of gate, then the same 8 of up, so that the thread
that has one has the other.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.weights import WeightTensors

GROUP, SLAB, SLAB_BYTES = 16, 128, 1152
VALUE_SCALE = 2.0**16  # decoded values are the weights, without the tensor scale, divided by this

# Decoded, a code's sign, two exponent bits and mantissa bit are at these places of its half of a word; a pair's first
# value has the lower half. For each pair of a block: the word that holds it, and how far to the right it is rotated
# there. 2 is both words: the first one at _FREE bits of each half, the second elsewhere.
_PLACES = (15, 8, 7, 6)
_TURNS = ((0, 0), (0, 4), (0, 10), (1, 2), (1, 8), (1, 14), (2, 6), (2, 12))
_FREE = (0, 1, 9, 10)


class Tiles(NamedTuple):
    """data: uint8 [experts, groups, slabs, 1152].  row_scale: FP32 [experts, groups * 16], tensor scale times 2^16 of
    each output in the tiles' order.  half: outputs of gate where gate and up take turns, else 0.
    scales: the tensor scale of each part, as a number of the host, [experts][parts]."""

    data: Tensor
    row_scale: Tensor
    half: int
    scales: tuple[tuple[float, ...], ...]

    @property
    def groups(self) -> int:
        return self.data.shape[1]

    @property
    def slabs(self) -> int:
        return self.data.shape[2]


def pack(parts: Sequence[WeightTensors]) -> Tiles:
    """Tiles of one NVFP4 projection, of several fused along their outputs, or of stacks of them over experts.

    Raises ValueError for a negative or NaN block scale, and for a number of inputs that is no multiple of 16.
    """
    half = parts[0].out_features if len(parts) == 2 and len({part.out_features for part in parts}) == 1 else 0
    experts = parts[0].weight.shape[0] if parts[0].weight.ndim == 3 else 1
    if parts[0].in_features % GROUP:
        raise ValueError(f"NVFP4 weights of {parts[0].in_features} inputs: not a multiple of {GROUP}")
    stacked = [_stacked(part, experts) for part in parts]
    factors = torch.cat([scale_2.unsqueeze(1).expand(-1, weight.shape[1]) for weight, _, scale_2 in stacked], 1)
    order = _output_order(factors.shape[1], half, factors.device)
    row_scale = torch.nn.functional.pad(factors * VALUE_SCALE, (0, 1))[:, order]
    data = torch.stack(
        [
            _slabs(torch.cat([w[e] for w, _, _ in stacked]), torch.cat([s[e] for _, s, _ in stacked]), order)
            for e in range(experts)
        ]
    )
    scales = torch.stack([scale_2 for _, _, scale_2 in stacked], 1).tolist()
    return Tiles(data, row_scale.contiguous(), half, tuple(map(tuple, scales)))


def _stacked(part: WeightTensors, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 [E, out, in / 2], the scales' bytes [E, out, in / 16], FP32 [E]."""
    weight = part.weight.reshape(experts, *part.weight.shape[-2:])
    scale = part.scale.view(torch.uint8).reshape(experts, *part.scale.shape[-2:])
    if weight.shape[-1] * 2 != scale.shape[-1] * 16:
        raise ValueError(f"weight_scale {list(part.scale.shape)} does not fit packed weights {list(part.weight.shape)}")
    if scale.numel() and int(scale.max()) >= 127:
        raise ValueError("weight_scale holds a negative number or NaN")
    return weight, scale, part.scale_2.float().reshape(-1).expand(experts)


def _output_order(outputs: int, half: int, device: torch.device) -> Tensor:
    """For each place of the tiles its output; `outputs` for one that is filled up with zeros."""
    if half:
        gate = torch.arange(-(-half // 8) * 8, device=device).view(-1, 8)
        up = torch.where(gate < half, gate + half, outputs)
        return torch.stack((torch.where(gate < half, gate, outputs), up), 1).flatten()
    order = torch.arange(-(-outputs // GROUP) * GROUP, device=device)
    return order.clamp(max=outputs)


def _slabs(packed: Tensor, scale: Tensor, order: Tensor) -> Tensor:
    """One expert: [groups, slabs, 1152] of packed uint8 [out, in / 2] and scale bytes [out, in / 16]."""
    slabs = -(-packed.shape[1] // (SLAB // 2))
    fill = (0, slabs * SLAB // 2 - packed.shape[1], 0, 1)
    codes = torch.nn.functional.pad(torch.where(scale.repeat_interleave(8, 1) == 0, 0, packed), fill)[order]
    scale = torch.nn.functional.pad(_WITHOUT_SUBNORMAL.to(scale.device)[scale.int()], (0, fill[1] // 8, 0, 1))[order]
    words = _words(codes.view(-1, 2, 8, slabs, 2, 4, 8))  # group, half, g, slab, tile, block, byte to word
    tiles = words.permute(0, 3, 4, 2, 5, 1, 6).contiguous()  # group, slab, tile, g, block, half, word
    scales = scale.view(-1, 2, 8, slabs, 2, 4).permute(0, 3, 2, 5, 4, 1)  # group, slab, g, block, tile, half
    groups = order.shape[0] // GROUP
    return torch.cat((tiles.view(torch.uint8).view(groups, slabs, -1), scales.reshape(groups, slabs, -1)), -1)


def _words(codes: Tensor) -> Tensor:
    """A block's bytes [..., 8], a pair of codes each, to its words, int32 [..., 2]."""
    total = torch.zeros(*codes.shape[:-1], 2, dtype=torch.int32, device=codes.device)
    for index in range(8):
        total |= _PAIRS[index].to(codes.device)[codes[..., index].int()]
    return total


def _pair_table(index: int) -> Tensor:
    """For each byte (two codes) its bits in the block's words, int32 [256, 2]."""
    byte = torch.arange(256, dtype=torch.int64)
    words = torch.zeros(256, 2, dtype=torch.int64)
    holder, turn = _TURNS[index]
    for value, bit in itertools.product(range(2), range(4)):
        place = (_PLACES[bit] + 16 * value - turn) % 32
        word = holder if holder < 2 else int(place % 16 not in _FREE)
        words[:, word] |= ((byte >> (4 * value + 3 - bit)) & 1) << place
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _scale_table() -> Tensor:
    """E4M3 bytes 0 .. 127 to five exponent and three mantissa bits."""
    table = []
    for byte in range(128):
        exponent, mantissa = byte >> 3, byte & 7
        if exponent == 0 and mantissa:
            shift = 4 - mantissa.bit_length()
            exponent, mantissa = 1 - shift, (mantissa << shift) & 7
        table.append(0 if byte == 0 else (exponent + 9) << 3 | mantissa)
    return torch.tensor(table, dtype=torch.uint8)


_PAIRS = tuple(_pair_table(index) for index in range(8))
_WITHOUT_SUBNORMAL = _scale_table()
