"""config.json to values: every field is computed as transformers 5.23 does, refused by name, or named as unknown.

A field that is absent has transformers' default, one that is null what null means there. Source of the meanings:
transformers' modeling_rope_utils.py and models/deepseek_v3; logits are compared in tests/parity/test_config_fields.py.
"""

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from deepseek_fp4_plugin.checkpoint.findings import Finding, Severity, error, warning

ARCHITECTURE = "DeepseekV3ForCausalLM"
_REQUIRED = object()
_REFUSED = object()


class _Kind(NamedTuple):
    """expected: in words.  fits: whether a JSON value is one."""

    expected: str
    fits: Callable[[Any], bool]


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


SIZE = _Kind("an integer above 0", lambda value: _is_int(value, 1))
COUNT = _Kind("an integer of at least 0", lambda value: _is_int(value, 0))
NUMBER = _Kind("a number", _is_number)
POSITIVE = _Kind("a number above 0", lambda value: _is_number(value) and value > 0)
FLAG = _Kind("true or false", lambda value: isinstance(value, bool))


class _Field(NamedTuple):
    """absent: the value of a field that is not there.  null: of one that is null."""

    kind: _Kind
    absent: Any = _REQUIRED
    null: Any = _REFUSED


FIELDS: dict[str, _Field] = {
    "vocab_size": _Field(SIZE),
    "hidden_size": _Field(SIZE),
    "intermediate_size": _Field(SIZE),
    "num_hidden_layers": _Field(SIZE),
    "num_attention_heads": _Field(SIZE),
    "moe_intermediate_size": _Field(SIZE),
    "n_routed_experts": _Field(SIZE),
    "num_experts_per_tok": _Field(SIZE),
    "kv_lora_rank": _Field(SIZE),
    "qk_nope_head_dim": _Field(SIZE),
    "qk_rope_head_dim": _Field(SIZE),
    "v_head_dim": _Field(SIZE),
    "q_lora_rank": _Field(SIZE, 1536, None),
    "n_shared_experts": _Field(COUNT, 1, 0),
    "first_k_dense_replace": _Field(COUNT, 3),
    "moe_layer_freq": _Field(SIZE, 1),
    "n_group": _Field(SIZE, 8, 1),
    "topk_group": _Field(SIZE, 4, 1),
    "norm_topk_prob": _Field(FLAG, True, False),
    "routed_scaling_factor": _Field(NUMBER, 2.5),
    "rms_norm_eps": _Field(POSITIVE, 1e-6),
    "rope_interleave": _Field(FLAG, True, False),
    "max_position_embeddings": _Field(SIZE, 4096),
    "num_nextn_predict_layers": _Field(COUNT, 1, 0),
}
MTP_FIELDS = ("num_nextn_predict_layers", "num_mtp_layers")
# transformers' other name of a field -> ours.
_ALIASES = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"}
# What is computed has these values; any other would be another model.
_FIXED: dict[str, tuple[Any, ...]] = {
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "hidden_act": ("silu", "swish"),  # two names of one function
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "tie_word_embeddings": (False, None),
    "partial_rotary_factor": (1, None),
}
# Fields that change nothing of what a forward pass computes, or that other files here read.
_HARMLESS = """
    architectures model_type auto_map torch_dtype dtype transformers_version quantization_config compression_config
    _name_or_path name_or_path _commit_hash _attn_implementation _attn_implementation_internal attn_implementation
    _attn_implementation_autoset _experts_implementation tokenizer_class torchscript tf_legacy_loss use_bfloat16
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id decoder_start_token_id unk_token_id
    attention_dropout hidden_dropout embd_pdrop attn_pdrop resid_pdrop initializer_range pretraining_tp ep_size
    use_cache aux_loss_alpha seq_aux router_aux_loss_coef router_z_loss_coef output_router_logits
    num_key_value_heads head_dim qk_head_dim output_attentions output_hidden_states return_dict use_return_dict
    chunk_size_feed_forward problem_type id2label label2id num_labels is_decoder is_encoder_decoder
    add_cross_attention cross_attention_hidden_size tie_encoder_decoder pruned_heads finetuning_task
    task_specific_params prefix base_model_tp_plan base_model_pp_plan max_length min_length do_sample early_stopping
    num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens unsloth_fixed unsloth_version model_name
    rope_theta rope_scaling rope_parameters original_max_position_embeddings language license tags
"""
_ROPE_PLAIN = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
_ROPE_YARN = {
    *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    *("attention_factor", "truncate"),
}


class Reading:
    """The values of one config.json, and what was found on the way."""

    def __init__(self, config: dict[str, Any], where: str):
        self.config, self.where = config, where
        self.findings: list[Finding] = []
        self.values: dict[str, Any] = {}

    def wrong(self, field: str, sentence: str) -> None:
        self.findings.append(error(field, f"{self.where}: {sentence}"))

    def take(
        self, section: dict[str, Any], name: str, kind: _Kind, absent: Any, null: Any = None, path: str = ""
    ) -> Any:
        """The field's value; a finding and None when it is of another type or out of range."""
        shown = f"{path}{name}"
        if name not in section:
            if absent is _REQUIRED:
                self.wrong(shown, f"{shown} is missing; take the file from the original checkpoint")
            return None if absent is _REQUIRED else absent
        value = section[name]
        if value is None and null is not _REFUSED:
            return null
        if not kind.fits(value):
            self.wrong(shown, f"{shown} is {_shown(value)}, expected {kind.expected}")
            return None
        return value


def read(config: dict[str, Any], where: str) -> Reading:
    """Everything that this program computes of a config, checked. Nothing is raised.

    `values` holds FIELDS' names, rope_theta, and rope_scaling as a dict or None; it is of use only without errors.
    """
    reading = Reading(config, where)
    if not _check_architecture(reading):
        return reading
    config = _without_aliases(reading)
    for name, field in FIELDS.items():
        reading.values[name] = reading.take(config, name, field.kind, field.absent, field.null)
    _check_fixed(reading)
    _read_rope(reading)
    _check_unknown(reading)
    if all(finding.severity is not Severity.ERROR for finding in reading.findings):
        _check_sizes(reading)
    return reading


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_architecture(reading: Reading) -> bool:
    config, where = reading.config, reading.where
    architectures, model_type = config.get("architectures"), config.get("model_type")
    if architectures is None:
        architectures = []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        reading.wrong("architectures", f"architectures is {_shown(architectures)}, expected a list of names")
        return False
    if not isinstance(model_type, str | None):
        reading.wrong("model_type", f"model_type is {_shown(model_type)}, expected a name")
        return False
    problem = _other_model(config, architectures, model_type or "")
    if problem:
        reading.findings.append(error("architectures", f"{where} {problem}"))
    return not problem


def _other_model(config: dict[str, Any], architectures: list[str], model_type: str) -> str | None:
    """What to say of a config that is not DeepSeek-V3's."""
    name = (architectures or [model_type or "nothing"])[0]
    names = " ".join([*architectures, model_type]).lower()
    ours = "V3, V3-0324, V3.1, R1 and R1-0528 work"
    if any(version in names for version in ("v32", "v3_2", "v4")):
        return (
            f"describes {name}: DeepSeek V3.2 and V4 have sparse attention, which this program does not compute; {ours}"
        )
    if "glm" in names:
        return f"describes {name}: GLM is another architecture, which this program does not compute; DeepSeek {ours}"
    if "index_topk" in config:
        return (
            f"describes {name} with sparse attention (index_topk), which this program does not compute; DeepSeek {ours}"
        )
    if ARCHITECTURE in architectures or model_type == "deepseek_v3":
        return None
    inner = config.get("text_config")
    if isinstance(inner, dict) and (
        inner.get("model_type") == "deepseek_v3" or ARCHITECTURE in (inner.get("architectures") or ())
    ):
        return (
            f"names architecture {name}, a {ARCHITECTURE} (text_config) inside a larger model; only {ARCHITECTURE} "
            "itself is supported"
        )
    found = ", ".join(architectures or [model_type or "nothing"])
    return f"names architecture {found}; only {ARCHITECTURE} is supported"


def _without_aliases(reading: Reading) -> dict[str, Any]:
    """The config with transformers' newer names replaced by the published ones."""
    config = dict(reading.config)
    for alias, name in _ALIASES.items():
        if alias not in config:
            continue
        value = config.pop(alias)
        if config.setdefault(name, value) != value or isinstance(config[name], bool) != isinstance(value, bool):
            both = f"{name} is {_shown(config[name])} and {alias} {_shown(value)}"
            reading.wrong(name, f"{both}, which are two names of one field; make them equal")
    return config


def _check_fixed(reading: Reading) -> None:
    config, values = reading.config, reading.values
    for name, allowed in _FIXED.items():
        value = config.get(name, allowed[0])
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in allowed):
            reading.wrong(name, f"{name}={_shown(value)} is not supported, expected {_shown(allowed[0])}")
    rope, nope = values["qk_rope_head_dim"], values["qk_nope_head_dim"]
    for name, expected in (("head_dim", rope), ("qk_head_dim", None if None in (rope, nope) else rope + nope)):
        if config.get(name) is not None and expected is not None and config[name] != expected:
            reading.wrong(name, f"{name} is {_shown(config[name])}, but the other fields make it {expected}")
    heads = config.get("num_key_value_heads")
    if heads is not None and heads != values["num_attention_heads"]:
        sentence = f"num_key_value_heads={_shown(heads)} is not used: in latent attention every head has its own key"
        reading.findings.append(warning("num_key_value_heads", f"{reading.where}: {sentence}"))


def _check_unknown(reading: Reading) -> None:
    known = set(_HARMLESS.split()) | FIELDS.keys() | _ALIASES.keys() | _FIXED.keys()
    unknown = [name for name in reading.config if name not in known]
    section, rope = _rope_section(reading.config)
    if isinstance(rope, dict):
        used = _ROPE_PLAIN | (_ROPE_YARN if _rope_type(rope) == "yarn" else set())
        unknown += [f"{section}.{name}" for name in rope if name not in used]
    if unknown:
        fields = (
            "field that this program does" if len(unknown) == 1 else f"{len(unknown)} fields that this program does"
        )
        sentence = f"has {'a ' if len(unknown) == 1 else ''}{fields} not know and does not use: {', '.join(unknown)}"
        reading.findings.append(
            warning(
                unknown[0], f"{reading.where} {sentence}; if one changes what the model computes, results are wrong"
            )
        )


def _rope_section(config: dict[str, Any]) -> tuple[str, Any]:
    """As transformers does: `rope_scaling` if there is something in it, else `rope_parameters`."""
    if config.get("rope_scaling"):
        return "rope_scaling", config["rope_scaling"]
    return "rope_parameters", config.get("rope_parameters") or {}


def _rope_type(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _read_rope(reading: Reading) -> None:
    config, values = reading.config, reading.values
    values["rope_scaling"] = None
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name), dict | None):
            reading.wrong(name, f"{name} is {_shown(config[name])}, expected an object or null")
            return
    if config.get("rope_scaling") and config.get("rope_parameters") not in (None, {}, config["rope_scaling"]):
        sentence = "rope_scaling and rope_parameters differ; rope_scaling is used, as transformers does"
        reading.findings.append(warning("rope_parameters", f"{reading.where}: {sentence}"))
    section, rope = _rope_section(config)
    place = config if "rope_theta" not in rope else rope
    path = f"{section}." if place is rope else ""
    values["rope_theta"] = reading.take(place, "rope_theta", POSITIVE, 10000.0, _REFUSED, path)
    if values["rope_theta"] is not None:
        values["rope_theta"] = float(values["rope_theta"])
        if values["rope_theta"] == 1:
            reading.wrong(
                "rope_theta", "rope_theta is 1, which turns every pair equally; take the original config.json"
            )
    if any(isinstance(value, dict) for value in rope.values()):
        reading.wrong(section, f"{section} has a section for each kind of layer, which this program does not compute")
        return
    if rope.get("partial_rotary_factor") not in (None, 1):
        value = _shown(rope["partial_rotary_factor"])
        reading.wrong("partial_rotary_factor", f"{section}.partial_rotary_factor={value} is not supported, expected 1")
    kind = _rope_type(rope)
    if kind == "yarn":
        values["rope_scaling"] = _yarn(reading, section, rope)
    elif kind not in ("default", None):
        reading.wrong(section, f"rope scaling of type {_shown(kind)} is not supported, only yarn (in {section})")


def _yarn(reading: Reading, section: str, rope: dict[str, Any]) -> dict[str, Any]:
    """YarnScaling's fields, with transformers' defaults filled in."""
    config, path = reading.config, f"{section}."

    def take(name: str, kind: _Kind, absent: Any, null: Any = None) -> Any:
        return reading.take(rope, name, kind, absent, null, path)

    longest = reading.values["max_position_embeddings"]
    if "original_max_position_embeddings" in config:  # transformers prefers it to the section's
        original = reading.take(config, "original_max_position_embeddings", SIZE, None, _REFUSED)
    else:
        original = take("original_max_position_embeddings", SIZE, longest, _REFUSED)
    factor = take("factor", POSITIVE, _REQUIRED)
    if factor is None and rope.get("factor", 0) is None and original and longest:
        factor = longest / original
    return {
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": take("beta_fast", NUMBER, 32) or 32,
        "beta_slow": take("beta_slow", NUMBER, 1) or 1,
        "mscale": take("mscale", NUMBER, 0) or 0,
        "mscale_all_dim": take("mscale_all_dim", NUMBER, 0) or 0,
        "attention_factor": take("attention_factor", POSITIVE, None),
        "truncate": take("truncate", FLAG, True, False),
    }


def _check_sizes(reading: Reading) -> None:
    v = reading.values
    experts, groups, kept = v["n_routed_experts"], v["n_group"], v["topk_group"]
    if experts % groups:
        reading.wrong("n_group", f"{experts} experts cannot form n_group={groups} groups")
    elif not 1 <= kept <= groups:
        reading.wrong("topk_group", f"topk_group={kept} must lie in 1..n_group={groups}")
    elif v["num_experts_per_tok"] > kept * (experts // groups):
        reading.wrong("num_experts_per_tok", f"num_experts_per_tok={v['num_experts_per_tok']} exceeds the kept experts")
    if groups > 1 and experts // groups < 2:
        reading.wrong("n_group", "a group needs at least two experts, its score is the sum of its best two")
    if v["qk_rope_head_dim"] % 2:
        reading.wrong("qk_rope_head_dim", f"qk_rope_head_dim={v['qk_rope_head_dim']} must be even")
    yarn = v["rope_scaling"]
    if yarn and (yarn["beta_fast"] <= 0 or yarn["beta_slow"] <= 0 or v["rope_theta"] <= 1):
        reading.wrong("rope_scaling", "yarn needs beta_fast and beta_slow above 0 and rope_theta above 1")
