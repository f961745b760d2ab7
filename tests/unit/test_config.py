"""Names, defaults and refusals of the caller's choices."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from deepseek_fp4_plugin.config import EngineConfig, GuidedDecodingParams, KvCacheConfig, SamplingParams
from deepseek_fp4_plugin.settings.choices import ANY
from deepseek_fp4_plugin.settings.engine import UNREAD

CARD_YAML = """\
moe_backend: TRTLLM
use_cuda_graph: true
speculative_config:
  decoding_type: MTP
  num_nextn_predict_layers: 3
  use_relaxed_acceptance_for_thinking: true
  relaxed_topk: 10
  relaxed_delta: 0.6
"""
TODAYS_YAML = """\
moe_config: {backend: trtllm}
cuda_graph_config: {}
speculative_config:
  decoding_type: MTP
  max_draft_len: 3
  use_relaxed_acceptance_for_thinking: true
  relaxed_topk: 10
  relaxed_delta: 0.6
"""


# ---------------------------------------------------------------- SamplingParams


@pytest.mark.parametrize(
    ("given", "greedy"),
    [
        ({"max_tokens": 32}, True),
        ({"temperature": 0.7}, False),
        ({"top_p": 0.9}, False),
        ({"top_k": 40}, False),
        ({"min_p": 0.1}, False),
        ({"temperature": 0.0, "top_p": 0.9}, True),
        ({"temperature": 0.7, "top_k": 1}, True),
        ({"temperature": 0.7, "top_p": 0.0}, True),
        ({"top_k": 0}, False),
    ],
)
def test_greedy_rule(given: dict[str, Any], greedy: bool) -> None:
    assert SamplingParams(**given).greedy is greedy


def test_defaults_and_the_two_names_of_max_tokens() -> None:
    plain = SamplingParams()
    assert (plain.max_tokens, plain.n, plain.temperature, plain.detokenize, plain.ignore_eos) == (
        32,
        1,
        None,
        True,
        False,
    )
    assert not plain.model_fields_set  # so that the LLM's own default applies
    named = SamplingParams(max_new_tokens=8)
    assert named.max_tokens == 8 and named.model_fields_set == {"max_tokens"}
    assert SamplingParams(max_tokens=8, max_new_tokens=8) == named
    assert SamplingParams(max_tokens=None).max_tokens is None
    with pytest.raises(ValueError, match="max_tokens=8 and max_new_tokens=9 are the same setting"):
        SamplingParams(max_tokens=8, max_new_tokens=9)
    with pytest.raises(TypeError):
        SamplingParams(32)  # type: ignore[call-arg]  # keyword only
    with pytest.raises(ValueError, match="frozen"):
        plain.max_tokens = 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temprature": 1}, "no setting 'temprature'; did you mean 'temperature'"),
        ({"temperature": -0.1}, "temperature=-0.1 must be at least 0"),
        ({"temperature": math.nan}, "temperature=nan must be a finite number"),
        ({"presence_penalty": math.inf}, "presence_penalty=inf must be a finite number"),
        ({"repetition_penalty": 0.0}, "must be above 0"),
        ({"top_p": 1.01}, "must be at most 1"),
        ({"top_k": -1}, "must be at least 0"),
        ({"top_k": 2.5}, "must be an integer"),
        ({"max_tokens": 0}, "must be at least 1"),
        ({"max_tokens": True}, "must be an integer"),
        ({"max_tokens": "32"}, "must be an integer"),
        ({"n": 0, "temperature": 1.0}, "must be at least 1"),
        ({"n": 2}, "n=2 greedy answers would all be the same"),
        ({"n": 2, "best_of": 3, "temperature": 1.0}, "best_of=3 is not n=2"),
        ({"stop": ["a", ""]}, "must be a text that is not empty"),
        ({"stop": "a", "detokenize": False}, "stop texts need detokenize"),
        ({"stop_token_ids": [-1]}, "must be at least 0"),
        ({"min_tokens": 5, "max_tokens": 3}, "min_tokens=5 is more than max_tokens=3"),
        ({"logit_bias": {3: math.nan}}, "must be a finite number"),
        ({"truncate_prompt_tokens": 0}, "must be at least 1"),
        ({"relaxed_topk": 0}, "must be at least 1"),
        ({"relaxed_delta": -0.1}, "must be at least 0"),
        ({"use_beam_search": True}, "use_beam_search=True is not offered here"),
        ({"length_penalty": 2.0}, "length_penalty=2.0 is not offered here"),
        ({"guided_decoding": {"regex": "a", "json": "{}"}}, "json and regex cannot both"),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        SamplingParams(**given)
    assert "\n" not in str(caught.value)


def test_settings_that_ask_for_nothing_are_taken() -> None:
    params = SamplingParams(use_beam_search=False, pad_id=1, embedding_bias=None, length_penalty=1.0, best_of=1)
    assert params == SamplingParams(best_of=1)
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(bad_words=["x"]).bad == ("x",)


def test_objects_of_other_packages() -> None:
    other = SimpleNamespace(
        max_tokens=7, temperature=1.0, top_p=1.0, top_k=-1, stop=[], seed=None, use_beam_search=False,
        embedding_bias=None, output_kind="anything of their own",
    )  # fmt: skip
    assert SamplingParams.from_any(other).model_dump(exclude_unset=True) == {
        "max_tokens": 7,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
    }
    assert not SamplingParams.from_any(SimpleNamespace(max_tokens=32, n=1)).model_fields_set
    assert SamplingParams.from_any(SimpleNamespace(max_tokens=None)).max_tokens is None
    own = SamplingParams(seed=3)
    assert SamplingParams.from_any(own) is own
    with pytest.raises(ValueError, match="use_beam_search"):
        SamplingParams.from_any(SimpleNamespace(max_tokens=3, use_beam_search=True))
    for wrong in ({"max_tokens": 3}, 5, "greedy", SamplingParams):
        with pytest.raises(TypeError, match="give SamplingParams"):
            SamplingParams.from_any(wrong)


def test_guided_decoding_is_kept() -> None:
    assert SamplingParams(guided_decoding=GuidedDecodingParams(regex="a+")).guided_decoding.regex == "a+"


# ---------------------------------------------------------------- EngineConfig


def test_the_cards_yaml_in_its_flat_and_its_present_form(tmp_path) -> None:
    configs = []
    for name, text in (("card", CARD_YAML), ("today", TODAYS_YAML)):
        (tmp_path / name).write_text(text)
        configs.append(EngineConfig.from_yaml(tmp_path / name))
    assert configs[0] == configs[1]
    speculative = configs[0].speculative_config
    assert speculative is not None
    assert (speculative.num_nextn_predict_layers, speculative.relaxed_topk, speculative.relaxed_delta) == (3, 10, 0.6)
    assert configs[0].moe_config.backend == "TRTLLM"


def test_the_cards_python_call_and_command_line() -> None:
    config = EngineConfig.from_kwargs(
        "nvidia/DeepSeek-R1-0528-FP4", tp_size=8, ep_size=2, max_batch_size=4, max_num_tokens=32768, backend="pytorch",
        trust_remote_code=True, kv_cache_free_gpu_memory_fraction=0.75, enable_attention_dp=True,
    )  # fmt: skip
    assert (config.tensor_parallel_size, config.moe_expert_parallel_size, config.max_batch_size) == (8, 2, 4)
    assert config.kv_cache_config == KvCacheConfig(free_gpu_memory_fraction=0.75)


def test_other_flat_keys_reach_their_objects() -> None:
    config = EngineConfig(
        pytorch_backend_config={"cuda_graph_padding_enabled": True, "print_iter_log": True},
        cuda_graph_batch_sizes=[1, 4],
        kv_cache_dtype="fp8",
        kv_cache_config={"enable_block_reuse": False},
    )
    assert config.cuda_graph_config is not None
    assert config.cuda_graph_config.enable_padding and config.cuda_graph_config.batch_sizes == (1, 4)
    assert config.kv_cache_config.dtype == "fp8" and not config.kv_cache_config.enable_block_reuse
    assert EngineConfig(use_cuda_graph=False).cuda_graph_config is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tensor_paralel_size": 8}, "no setting 'tensor_paralel_size'; did you mean 'tensor_parallel_size'"),
        ({"use_cuda_grph": True}, "did you mean 'use_cuda_graph'"),
        (
            {"speculative_config": {"relaxed_top_k": 3}},
            "Config has no setting 'relaxed_top_k'; did you mean",
        ),
        ({"speculative_config": {"decoding_type": "Eagle"}}, "must be one of 'MTP'"),
        ({"speculative_config": {"num_nextn_predict_layers": 0}}, "must be at least 1"),
        ({"kv_cache_config": {"free_gpu_memory_fraction": 1.5}}, "must be at most 1"),
        ({"kv_cache_config": 4}, "must be a mapping"),
        ({"kv_cache_dtype": "fp8", "kv_cache_config": {"dtype": "bf16"}}, "are the same setting; give one"),
        ({"use_cuda_graph": False, "cuda_graph_config": {}}, "give one"),
        ({"cuda_graph_config": {"batch_sizes": [1, 4], "max_batch_size": 8}}, "is not the largest"),
        ({"tp_size": 8, "ep_size": 3}, "does not divide tensor_parallel_size=8"),
        ({"tp_size": 8, "ep_size": 2, "moe_tensor_parallel_size": 2}, "leave one out"),
        ({"pp_size": 2}, "pp_size=2 is not offered here"),
        ({"backend": "tensorrt"}, "backend='tensorrt' is not offered here"),
        ({"dtype": "float16"}, "must be one of 'auto', 'bfloat16' or 'float32'"),
        ({"device": "tpu"}, "must be auto, cpu, cuda or cuda:0"),
        ({"max_batch_size": 0}, "must be at least 1"),
        ({"model": 5}, "must be a text"),
    ],
)
def test_refused_by_the_engine_config(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        EngineConfig(**given)
    assert "\n" not in str(caught.value)


def test_yaml_below_the_overrides(tmp_path) -> None:
    path = tmp_path / "args.yaml"
    path.write_text("max_batch_size: 8\nkv_cache_config: {dtype: bf16, max_tokens: 64}\n" + CARD_YAML)
    config = EngineConfig.from_yaml(path, max_batch_size=4, kv_cache_dtype="fp8", speculative_config=None)
    assert (config.max_batch_size, config.kv_cache_config.dtype, config.kv_cache_config.max_tokens) == (4, "fp8", 64)
    assert config.speculative_config is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML at line"),
        ("- 1\n", "must hold settings"),
        ("max_batch_size: many\n", "max_batch_size='many' must be an integer"),
        ("max_batchsize: 3\n", "did you mean 'max_batch_size'"),
    ],
)
def test_bad_yaml_names_the_file(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "args.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        EngineConfig.from_yaml(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read"):
        EngineConfig.from_yaml(tmp_path / "absent.yaml")


def test_empty_yaml_is_the_defaults(tmp_path) -> None:
    (tmp_path / "empty").write_text("")
    assert EngineConfig.from_yaml(tmp_path / "empty") == EngineConfig()


def test_settings_without_a_meaning_on_a_cpu_are_named_only_when_given(tmp_path) -> None:
    assert EngineConfig().ignored_settings("cpu") == []
    (tmp_path / "card").write_text(CARD_YAML)
    card = EngineConfig.from_yaml(tmp_path / "card", kv_cache_free_gpu_memory_fraction=0.75, tp_size=8)
    lines = card.ignored_settings("cpu")
    for name in ("use_cuda_graph", "moe_backend", "free_gpu_memory_fraction"):
        assert sum(name in line for line in lines) == 1, lines
    assert not any("tensor_parallel_size" in line for line in lines)
    assert not any("cuda_graph" in line or "fraction" in line for line in card.ignored_settings("cuda"))
    assert any("moe_backend" in line for line in card.ignored_settings("cuda"))


UPSTREAM = {"attn_backend": "TRTLLM", "sampler_type": "TRTLLMSampler", "gpus_per_node": 4, "print_iter_log": True,
            "num_postprocess_workers": 2, "guided_decoding_backend": "xgrammar", "enable_chunked_prefill": False,
            "enable_overlap_scheduler": False}  # fmt: skip
ASKS_NOTHING = {"guided_decoding_backend": "llguidance", "enable_chunked_prefill": True, "print_iter_log": False,
                "num_postprocess_workers": 0, "enable_overlap_scheduler": True, "attn_backend": None,
                "backend": "pytorch", "trust_remote_code": True}  # fmt: skip


def test_upstream_settings_that_nothing_reads_are_named(tmp_path) -> None:
    path = tmp_path / "args.yaml"
    path.write_text(yaml.safe_dump({**UPSTREAM, "max_batch_size": 4}))
    nested = EngineConfig(pytorch_backend_config=UPSTREAM)
    for config in (EngineConfig(**UPSTREAM), nested, EngineConfig.from_yaml(path)):
        for device in ("cpu", "cuda"):
            lines = config.ignored_settings(device)
            assert all(" ignored: " in line for line in lines) and len(lines) == len(UPSTREAM)
            assert {line.split("=")[0] for line in lines} == UPSTREAM.keys()
    assert any(line == "attn_backend=TRTLLM ignored: a device has one kind of attention" for line in lines)
    assert any(line.startswith("gpus_per_node=9") for line in
               EngineConfig.from_yaml(path, gpus_per_node=9).ignored_settings("cpu"))  # fmt: skip
    assert EngineConfig(**ASKS_NOTHING).ignored_settings("cpu") == []
    assert nested == EngineConfig()
    assert {name for name, values in EngineConfig.neutral.items() if values == (ANY,)} == {*UNREAD, "trust_remote_code"}


def test_attention_data_parallelism_without_ranks_is_named() -> None:
    alone = EngineConfig(enable_attention_dp=True)
    assert any("enable_attention_dp" in line for line in alone.ignored_settings("cpu"))
    assert EngineConfig(enable_attention_dp=True, tensor_parallel_size=2).ignored_settings("cpu") == []
    waits = EngineConfig(attention_dp_config={"enable_balance": True})
    assert any("attention_dp_config" in line for line in waits.ignored_settings("cuda"))


@pytest.mark.parametrize(
    ("text", "name", "line"),
    [
        ("max_batch_size: 4\nseed: 1\nmax_batch_size: 8\n", "max_batch_size", 3),
        ("max_batch_size: 4\n'max_batch_size': 4\n", "max_batch_size", 2),
        ("kv_cache_config:\n  dtype: fp8\n  max_tokens: 5\n  dtype: bf16\n", "dtype", 4),
        ("speculative_config: {max_draft_len: 1, max_draft_len: 2}\n", "max_draft_len", 1),
        ("pytorch_backend_config:\n  moe_backend: TRTLLM\n  moe_backend: CUTLASS\n", "moe_backend", 3),
    ],
)
def test_a_key_twice_in_a_file_is_refused(tmp_path, text: str, name: str, line: int) -> None:
    path = tmp_path / "args.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path} has {name} twice, again at line {line}"):
        EngineConfig.from_yaml(path)


def test_merged_yaml_keys_are_no_duplicates(tmp_path) -> None:
    path = tmp_path / "args.yaml"
    path.write_text("speculative_config:\n  <<: {max_draft_len: 2, relaxed_topk: 5}\n  relaxed_topk: 7\n")
    speculative = EngineConfig.from_yaml(path).speculative_config
    assert speculative is not None
    assert (speculative.num_nextn_predict_layers, speculative.relaxed_topk) == (2, 7)


@pytest.mark.parametrize("text", ["seed: 2020-13-45\n", "[" * 5000, "max_batch_size: .nan\n", "seed: .inf\n"])
def test_strange_yaml_is_one_sentence(tmp_path, text: str) -> None:
    path = tmp_path / "args.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=str(path)) as caught:
        EngineConfig.from_yaml(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_batch_size": 10**20},
        {"max_num_tokens": 2**31},
        {"max_seq_len": 10**30},
        {"stream_interval": 10**20},
        {"kv_cache_config": {"tokens_per_block": 10**20}},
        {"kv_cache_config": {"free_gpu_memory_fraction": float("nan")}},
        {"speculative_config": {"relaxed_delta": float("inf")}},
    ],
)
def test_numbers_beyond_reason_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="must be"):
        EngineConfig(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": 10**30},
        {"max_tokens": 10**30},
        {"min_tokens": 10**30},
        {"logprobs": 10**30},
        {"end_id": 10**30},
        {"temperature": float("nan")},
        {"presence_penalty": 1e300},
        {"frequency_penalty": -1e300},
        {"repetition_penalty": 1e300},
        {"repetition_penalty": 1e-300},
        {"logit_bias": {3: 1e300}},
        {"logit_bias": {3: float("inf")}},
        {"min_p": float("nan")},
    ],
)
def test_requests_beyond_what_logits_hold_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="must be"):
        SamplingParams(**wrong)


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    assert SamplingParams(temperature=1e-300).greedy
    assert not SamplingParams(temperature=1e-3).greedy


def test_blanks_between_special_tokens_are_not_offered() -> None:
    assert SamplingParams(spaces_between_special_tokens=True) == SamplingParams()
    with pytest.raises(ValueError, match="spaces_between_special_tokens=False is not offered here"):
        SamplingParams(spaces_between_special_tokens=False)


def test_settings_without_a_meaning_are_named_on_a_gpu_too() -> None:
    config = EngineConfig(cuda_graph_config={"batch_sizes": [1, 2], "enable_padding": True}, moe_backend="CUTLASS")
    (line,) = config.ignored_settings("cuda")  # the graphs' settings have their meaning (Sizes.of)
    assert line.startswith("moe_backend=CUTLASS ignored")
    assert EngineConfig(use_cuda_graph=False).ignored_settings("cuda") == []
    assert EngineConfig(use_cuda_graph=False).ignored_settings("cpu") == []
