"""compressed-tensors' NVFP4, which llm-compressor writes: the bits of ModelOpt's under other names.

    here, and ModelOpt     compressed-tensors
    weight                 weight_packed
    weight_scale           weight_scale
    weight_scale_2         weight_global_scale     1 / x, in a tensor of shape [1]
    input_scale            input_global_scale      1 / x, in a tensor of shape [1]

Values and block scales are the same bytes. A global scale goes through one more rounding of FP32, so that what a reader
computes with is off by its last bit at most. Source: the package itself, with which tests compare.
"""

from collections.abc import Iterable
from typing import Any

PACK_QUANTIZED = "nvfp4-pack-quantized"
OWN_NAMES = {
    "weight_packed": "weight",
    "weight_scale": "weight_scale",
    "weight_global_scale": "weight_scale_2",
    "input_global_scale": "input_scale",
}
NAMES = {own: name for name, own in OWN_NAMES.items()}
INVERTED = ("weight_global_scale", "input_global_scale")
_ROUTER = "re:.*\\.mlp\\.gate$"  # a linear to those who replace modules by class


def config_section(exclude_modules: Iterable[str], kv_cache: str | None) -> dict[str, Any]:
    """The `quantization_config` of config.json; there is no other file.

    exclude_modules: as hf_quant_config.json has them, names and wildcards.  kv_cache: "FP8" or None.
    """
    four_bit = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": "torch.float8_e4m3fn",
    }
    cache = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": PACK_QUANTIZED,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**four_bit, "dynamic": False},
                "input_activations": {**four_bit, "dynamic": "local", "observer": "static_minmax"},
                "output_activations": None,
                "format": PACK_QUANTIZED,
            }
        },
        "ignore": [*map(_pattern, sorted(exclude_modules)), _ROUTER],
        "kv_cache_scheme": cache if kv_cache == "FP8" else None,
    }


def _pattern(name: str) -> str:
    """Names are exact here; what stands for several is a regular expression behind `re:`, matched from the start."""
    return "re:" + name.replace(".", "\\.").replace("*", ".*") if "*" in name else name
