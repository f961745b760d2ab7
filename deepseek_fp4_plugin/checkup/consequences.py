"""What each kind of fault does in which runtime, and whether it can be mended.

From reports of their users (vLLM #36094, #38439, #45212, #54974, #43455, SGLang #23625, #25704, Model-Optimizer #750);
what happens to gate and up scales that differ and to `weight_scale_2` was read in the sources of TensorRT-LLM (PyTorch
backend), vLLM 0.33 and SGLang 0.5.23. Other versions may do otherwise; "ours" is tested.
"""

from enum import StrEnum
from typing import NamedTuple

from deepseek_fp4_plugin.checkpoint.findings import Fault


class Mending(StrEnum):
    """Whether `--repair` can mend a fault."""

    YES = "yes"
    SOURCE = "with --source"
    NO = "no"


class Consequence(NamedTuple):
    """What happens, by runtime."""

    tensorrt_llm: str
    vllm: str
    sglang: str
    ours: str
    mending: Mending


RUNTIMES = {"tensorrt_llm": "TensorRT-LLM", "vllm": "vLLM", "sglang": "SGLang", "ours": "deepseek-fp4"}
_STOPS = "does not load"
_OVERFLOW = "overflows to NaN"
_SOME_NAN = "NaN on the prompts that reach this module"
_SAME = "the same text, as loaded"
_GARBAGE = "fluent or broken nonsense, no error"

_ = Mending  # short, in a long table
CONSEQUENCES: dict[Fault, Consequence] = {
    Fault.DAMAGED_FILE: Consequence(_STOPS, _STOPS, _STOPS, "refused from the header, file named", _.SOURCE),
    Fault.MISSING_SHARD: Consequence(
        _STOPS,
        "loads what is there; the rest keeps uninitialised memory in some versions",
        "loads what is there; the rest keeps uninitialised memory in some versions",
        "refused, shard named",
        _.SOURCE,
    ),
    Fault.MISSING_TENSOR: Consequence(
        "stops with a key error", "uninitialised memory or a late error", "uninitialised memory or a late error",
        "refused, tensor named", _.SOURCE,
    ),
    Fault.WRONG_INDEX: Consequence(
        "reads shards whole: unharmed", "reads shards whole: unharmed", "reads shards whole: unharmed",
        "refused, tensor named", _.YES,
    ),
    Fault.UNNAMED_SHARD: Consequence(
        "may be read, may be ignored", "ignored: its tensors are missing", "ignored: its tensors are missing",
        "ignored, and said", _.YES,
    ),
    Fault.OTHER_MODEL: Consequence(_STOPS, _STOPS, "loads, skipping them", "refused, tensor named", _.NO),
    Fault.NO_SCALE: Consequence(
        "stops with a key error", "uninitialised scales: " + _GARBAGE, "uninitialised scales: " + _GARBAGE,
        "refused, tensor named", _.SOURCE,
    ),
    Fault.SCALE_SIZE: Consequence(_STOPS, _STOPS, _STOPS, "refused, tensor named", _.SOURCE),
    Fault.TILED_SCALES: Consequence(
        "tiles them once more: " + _GARBAGE, "tiles them once more: " + _GARBAGE, "tiles them once more: " + _GARBAGE,
        _GARBAGE + " where the size is right", _.YES,
    ),
    Fault.TENSOR_SCALE: Consequence(
        "zeros or NaN", "zeros or NaN: empty answers", "zeros or NaN: empty answers",
        "NaN ends the request with an error naming the module; 0 gives zeros", _.SOURCE,
    ),
    Fault.RECIPROCAL: Consequence(_OVERFLOW, _OVERFLOW, _OVERFLOW, _OVERFLOW, _.YES),
    Fault.BLOCK_SCALE: Consequence(
        "NaN logits", "NaN logits: token 0 for ever", "NaN logits: token 0 for ever",
        "the request that meets NaN ends with an error naming the module", _.SOURCE,
    ),
    Fault.PAIR_SCALES: Consequence(
        "takes the larger for both and warns (older releases stop): up or gate is scaled wrongly",
        "takes gate's for both and warns once: up is scaled wrongly",
        "takes gate's for both and warns once: up is scaled wrongly",
        "each is used for its own: right",
        _.YES,
    ),
    Fault.NO_INPUT_SCALE: Consequence(
        "stops with a key error",
        "uninitialised scale: NaN on the prompts that reach this expert",
        "uninitialised scale: NaN on the prompts that reach this expert",
        "right with BF16 activations; FP4 activations are refused",
        _.YES,
    ),
    Fault.INPUT_SCALE: Consequence(
        "infinite or NaN activations", _SOME_NAN, _SOME_NAN,
        "right with BF16 activations; FP4 activations are refused", _.YES,
    ),
    Fault.NIBBLES: Consequence(_GARBAGE, _GARBAGE, _GARBAGE, _GARBAGE, _.SOURCE),
    Fault.ROUNDING: Consequence("lower scores", "lower scores", "lower scores", "lower scores", _.SOURCE),
    Fault.OTHER_VALUES: Consequence(
        "another model's text", "another model's text", "another model's text", "another model's text", _.SOURCE
    ),
    Fault.NOT_FINITE: Consequence(
        "NaN logits", "NaN logits: token 0 for ever", "NaN logits: token 0 for ever",
        "the request that meets it ends with an error naming the module", _.SOURCE,
    ),
    Fault.MTP_ABSENT: Consequence(
        "stops when MTP is asked for", "stops when MTP is asked for", "stops when NextN drafting is asked for",
        "runs without drafts, and says so", _.YES,
    ),
    Fault.MTP_UNCOUNTED: Consequence(
        "drafts nothing", "stops when MTP is asked for", "stops when NextN drafting is asked for",
        "not used, and said", _.YES,
    ),
    Fault.MTP_DROPPED: Consequence(
        "drafts nothing", "drafts nothing", "drafts nothing", "drafts nothing", _.SOURCE
    ),
    Fault.MTP_COPIES: Consequence(
        "uses the main model's: unharmed", "uses the copies: fewer drafts are accepted",
        "uses the main model's: unharmed", "uses the main model's: unharmed", _.YES,
    ),
    Fault.LATENT_QUANTIZED: Consequence(
        "does not load: kv_b_proj is split in BF16", "breaks the absorbed attention (vLLM #38439)",
        "breaks the absorbed attention", _SAME, _.YES,
    ),
    Fault.LISTS: Consequence(
        "builds the layer in the wrong format and stops",
        "builds the layer in the wrong format and stops",
        "builds the layer in the wrong format and stops, or fills it with noise",
        "the tensors decide: right",
        _.YES,
    ),
    Fault.QUANT_FILES: Consequence(
        "hf_quant_config.json decides", "config.json decides, then the other file",
        "either decides, by version", "the tensors decide; the cache is hf_quant_config.json's", _.YES,
    ),
    Fault.AUTO_MAP: Consequence(
        "stops under trust_remote_code", "stops under trust_remote_code", "stops under trust_remote_code",
        "no code of a checkpoint is ever run: right", _.YES,
    ),
    Fault.SPECIAL_TOKENS: Consequence(
        "answers do not end, or end at once", "answers do not end, or end at once",
        "answers do not end, or end at once", "generation_config.json's ids end an answer, as told", _.YES,
    ),
    Fault.VOCABULARY: Consequence(
        "out-of-range reads on those tokens", "stops or crashes on those tokens", "stops or crashes on those tokens",
        "prompts with such tokens are refused", _.SOURCE,
    ),
    Fault.TRUNCATION: Consequence(
        "prompts are cut silently where the library obeys it", "prompts are cut silently where the library obeys it",
        "prompts are cut silently where the library obeys it", "cleared at load: right", _.YES,
    ),
    Fault.CHAT_TEMPLATE: Consequence(
        "conversations in a form the model does not know", "conversations are refused or in an unknown form",
        "conversations in a guessed form", "conversations are refused or in an unknown form", _.SOURCE,
    ),
    Fault.NO_TOKENIZER: Consequence(_STOPS, _STOPS, _STOPS, "token ids only", _.SOURCE),
}  # fmt: skip


def mending(fault: Fault | None) -> Mending:
    return CONSEQUENCES[fault].mending if fault is not None else Mending.NO
