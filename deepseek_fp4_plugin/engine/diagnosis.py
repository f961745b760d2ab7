"""Why logits are not finite: the first module whose output is not, and the weight in it that is not.

A second look at one failed request: its tokens go through the model again, module by module and without a cache. No
step that goes well pays for any of it.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.decoder import DeepseekV3DecoderLayer
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM

MAX_TOKENS = 2048  # attention over more would take memory that a serving machine may not have to spare
_SLICE = 1 << 24  # elements looked at together


@torch.inference_mode()
def explain(model: DeepseekV3ForCausalLM, token_ids: Sequence[int], device: torch.device) -> str:
    """One sentence about the tokens of a request whose logits had NaN or infinity."""
    ids = token_ids[:MAX_TOKENS]
    module = next((name for name, output in _outputs(model, ids, device) if not _finite(output)), None)
    if module is None:
        again = "all" if len(ids) == len(token_ids) else f"the first {len(ids)}"
        return (
            f"the logits are not finite, but computing {again} of the request's tokens again gives finite values; "
            "the cause is not in the weights alone"
        )
    first = f"{module} is the first module with NaN or infinity in its output"
    return f"the logits are not finite: {first}, {_cause(model, module)}"


def _outputs(model: DeepseekV3ForCausalLM, ids: Sequence[int], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Each module's checkpoint name and output, in the order of the forward."""
    batch = ForwardBatch.from_sequences([ids], device)
    if model.mesh.enable_attention_dp:  # every rank looks at these tokens
        batch = replace(batch, dp_tokens=(len(ids),) * model.mesh.dp.count)
    inner = model.model
    hidden = inner.embed_tokens(batch.input_ids)
    yield "model.embed_tokens", hidden
    cos, sin = inner.rotary(batch.positions)
    for index, layer in enumerate(cast("list[DeepseekV3DecoderLayer]", inner.layers)):
        name = f"model.layers.{index}"
        normed = layer.input_layernorm(hidden)
        yield f"{name}.input_layernorm", normed
        attended = layer.attention(normed, cos, sin, batch, None)
        yield f"{name}.self_attn", attended
        hidden = ops.add(hidden, attended)
        normed = layer.post_attention_layernorm(hidden)
        yield f"{name}.post_attention_layernorm", normed
        computed = layer.feed_forward(normed, batch)
        yield f"{name}.mlp", computed
        hidden = ops.add(hidden, computed)
    hidden = inner.norm(hidden)
    yield "model.norm", hidden
    yield "lm_head", model.lm_head(hidden)


def _cause(model: DeepseekV3ForCausalLM, module: str) -> str:
    """The module's first weight or scale that is not finite, by its name in the checkpoint."""
    if model.path is None:
        return "and the model came from no checkpoint that its weights could be looked up in"
    try:
        with contextlib.closing(CheckpointReader(model.path)) as reader:
            for name in sorted((name for name in reader if name.startswith(f"{module}.")), key=_natural):
                found = _first_not_finite(reader.get(name)) if reader.info(name).dtype.is_floating_point else None
                if found is not None:
                    index, value = found
                    return f"because {name} has {value:g} at {index}; that weight is damaged, get the checkpoint again"
    except CheckpointError as error:
        return f"and its weights cannot be looked at: {error}"
    return "though its weights in the checkpoint are finite: values outgrow their type, or memory is at fault"


def _natural(name: str) -> list[int | str]:
    """Sorts expert 10 behind expert 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _first_not_finite(tensor: Tensor) -> tuple[list[int], float] | None:
    """Index and value of the first NaN or infinity; None without one."""
    flat = tensor.flatten()
    for start in range(0, flat.numel(), _SLICE):
        values = flat[start : start + _SLICE].float()
        wrong = (~values.isfinite()).nonzero()
        if len(wrong):
            first = int(wrong[0])
            index = torch.unravel_index(torch.tensor(start + first), tensor.shape) if tensor.dim() else ()
            return [int(i) for i in index], values[first].item()
    return None
