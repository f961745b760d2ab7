"""What `quantize` does on request alone: the MTP layer in NVFP4, scales of an FP8 cache, no calibration."""

import math

import pytest
import torch

from deepseek_fp4_plugin import LLM, SamplingParams
from deepseek_fp4_plugin.checkpoint.quant_config import QuantConfig
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader, read_json
from deepseek_fp4_plugin.layers.batch import Chunk, ForwardBatch, grouped
from deepseek_fp4_plugin.layers.mla import MLA
from deepseek_fp4_plugin.layers.weight_source import WeightSource
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.decoder import RotaryAngles
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.models.examination import examine
from deepseek_fp4_plugin.parallel.mesh import Mesh
from deepseek_fp4_plugin.quantization.calibrate import input_scales
from deepseek_fp4_plugin.quantization.calibration_data import load_calibration
from deepseek_fp4_plugin.quantization.observer import LayerObserver, cache_module
from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint
from deepseek_fp4_plugin.quantization.saved_calibration import load_saved
from deepseek_fp4_plugin.tokenizer import Tokenizer
from tests.stops import SETTINGS, contents, small  # noqa: F401 (fixture)

MTP = "model.layers.2"


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit."""
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@pytest.fixture(scope="module")
def plain(small, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("plain") / "result"
    quantize_checkpoint(small, folder, **SETTINGS)
    return folder


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):  # noqa: F811
    """With its MTP layer quantized and its cache scaled; and what calibration saw."""
    folder = tmp_path_factory.mktemp("whole")
    options = {"mtp": "nvfp4", "kv_scales": True, "save_calibration": folder / "seen.json"}
    quantize_checkpoint(small, folder / "result", **SETTINGS, **options)
    return folder / "result", load_saved(folder / "seen.json", DeepseekV3Config.from_folder(small)).found


def test_the_mtp_layers_mlps_become_nvfp4_and_nothing_else_changes(plain, whole):
    before, after = CheckpointReader(plain), CheckpointReader(whole[0])
    scaled = {name.removesuffix(".weight_scale_2") for name in after if name.endswith(".weight_scale_2")}
    mtp = {module for module in scaled if module.startswith(f"{MTP}.")}
    assert len(mtp) == 3 * (8 + 1) and all(".mlp." in module for module in mtp)
    for name in before:
        if name.removesuffix(".weight") not in mtp:
            assert same(before.get(name), after.get(name)), name
    files = read_json(whole[0] / "hf_quant_config.json"), read_json(whole[0] / "config.json")
    listed = QuantConfig.from_folder(whole[0], files[1])
    excluded = files[0]["quantization"]["exclude_modules"]
    assert [n for n in excluded if n.startswith(MTP)] == [
        f"{MTP}.{n}" for n in ("eh_proj", "self_attn*", "shared_head.head")
    ]
    for module in {name.removesuffix(".weight") for name in after if name.endswith("proj.weight")}:
        assert listed.excludes(module) != (module in scaled), module
    card = (whole[0] / "README.md").read_text(encoding="utf-8")
    assert "those of the MTP layer included" in card and "with calibrated scales" in card
    assert not [finding for finding in examine(whole[0]).findings if "MTP" in finding.sentence]


def test_the_mtp_layers_inputs_are_those_of_the_model(small, whole):  # noqa: F811
    """The text's next tokens, the main model's normed hidden states: by the model's own module."""
    model = DeepseekV3ForCausalLM.from_pretrained(small, backend="reference")
    config, rotary = DeepseekV3Config.from_folder(small), RotaryAngles(DeepseekV3Config.from_folder(small))
    data = load_calibration("builtin", Tokenizer.from_folder(small), SETTINGS["samples"], SETTINGS["tokens"], 1024)
    observer = LayerObserver(model.mtp.layer)
    with torch.inference_mode():
        for sample in data.samples:
            hidden = model(ForwardBatch.from_sequences([sample]))
            batch = ForwardBatch.from_sequences([sample[:-1]])
            embedded = model.model.embed_tokens(torch.tensor(sample[1:]))
            model.mtp(embedded, hidden[:-1], *rotary(batch.positions), batch, None)
    expected, (folder, found) = observer.result(), whole
    assert {n for n in found.amax if n.startswith(f"{MTP}.")} == set(expected.amax)
    shared = f"{MTP}.mlp.shared_experts.gate_proj"
    assert found.rows[shared] == expected.rows[shared] == data.num_tokens - len(data.samples)
    reader = CheckpointReader(folder)
    scales = input_scales(expected, [f"{MTP}.mlp.experts.{e}.down_proj" for e in range(config.n_routed_experts)])
    for module, scale in {**scales, **input_scales(expected, [shared])}.items():
        assert float(reader.get(f"{module}.input_scale")) == pytest.approx(float(scale), rel=0.05), module


def test_drafts_of_a_quantized_mtp_layer_do_not_show(whole):
    prompts, greedy = [[5, 6, 7, 8], list(range(30, 60))], SamplingParams(temperature=0.0, max_tokens=24)
    speculative = {"decoding_type": "MTP", "num_nextn_predict_layers": 2}
    found = []
    for config in (None, speculative):
        with LLM(str(whole[0]), dtype="float32", speculative_config=config, max_seq_len=200) as llm:
            found.append([output.outputs[0].token_ids for output in llm.generate(prompts, greedy)])
    assert found[0] == found[1]


@pytest.mark.parametrize("recipe", ["max", "gptq"])
def test_a_run_that_stopped_before_the_mtp_layer_goes_on(small, whole, tmp_path, recipe):  # noqa: F811
    options = {**SETTINGS, "mtp": "nvfp4", "kv_scales": True, "recipe": recipe}
    stopped: list[int] = []

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "calibrate" and done == 2 and not stopped:
            assert total == 3  # layers, of one batch each
            stopped.append(done)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(small, tmp_path / "result", **options, progress=stop)
    quantize_checkpoint(small, tmp_path / "result", **options)
    expected = whole[0]
    if recipe != "max":
        expected = tmp_path / "again" / "result"
        quantize_checkpoint(small, expected, **options)
    assert contents(tmp_path / "result") == contents(expected)


@pytest.mark.parametrize("form", ["modelopt", "compressed-tensors"])
def test_every_layer_has_one_scale_of_its_cache(small, whole, tmp_path, form):  # noqa: F811
    folder, names = whole[0], ("k_proj.k_scale", "v_proj.v_scale")
    if form != "modelopt":
        folder, names = tmp_path / "result", ("k_scale", "v_scale")
        quantize_checkpoint(small, folder, **SETTINGS, kv_scales=True, format=form)
    reader = CheckpointReader(folder)
    for layer in range(3 if form == "modelopt" else 2):
        attention = f"model.layers.{layer}.self_attn"
        key, value = (reader.get(f"{attention}.{name}") for name in names)
        assert key == value and key.shape == () and math.log2(key).is_integer()
        needed = 4 * whole[1].amax[cache_module(attention)] / 448
        assert needed <= key < 2 * needed
        assert WeightSource(reader).cache_scale(attention) == key
    assert WeightSource(reader).cache_scale("model.layers.7.self_attn") == 1.0


@torch.inference_mode()
def attended(mla: MLA, config: DeepseekV3Config, x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """17 tokens as a prompt, the others one by one; without a cache all at once."""
    cos, sin = RotaryAngles(config)(torch.arange(len(x)))
    if dtype is None:
        return mla(x, cos, sin, ForwardBatch.from_sequences([[0] * len(x)]), None)
    cache, table, outputs = torch.zeros(2, 16, config.latent_dim).to(dtype), torch.tensor([[0, 1]]), []
    for start, stop in [(0, 17), *((t, t + 1) for t in range(17, len(x)))]:
        rows, short = torch.arange(start, stop), stop - start == 1
        batch = ForwardBatch(
            input_ids=rows,
            positions=rows,
            slot_mapping=rows,
            block_tables=table,
            context_lens=torch.tensor([stop]),
            query_start=torch.tensor([0, 1] if short else [0]),
            num_decode_requests=int(short),
            num_decode_tokens=int(short),
            max_query=int(short),
            max_context=stop if short else 0,
            groups=() if short else grouped([Chunk(0, start, stop, stop)], table.device, table, 16),
        )
        outputs.append(mla(x[start:stop], cos[start:stop], sin[start:stop], batch, cache))
    return torch.cat(outputs)


def test_a_scaled_cache_holds_what_an_unscaled_one_cuts_off(small):  # noqa: F811
    config = DeepseekV3Config.from_folder(small)
    mla = MLA("model.layers.0.self_attn", config, Mesh())
    mla.load(WeightSource(CheckpointReader(small)))
    x = torch.randn(20, config.hidden_size).bfloat16()

    def error(scale: float) -> float:
        mla.cache_scale = scale
        expected = attended(mla, config, x, None).float()
        return float((attended(mla, config, x, torch.float8_e4m3fn).float() - expected).norm() / expected.norm())

    ordinary = [error(scale) for scale in (1.0, 2.0, 0.5)]
    assert max(ordinary) < 0.1 and max(ordinary) < 1.2 * min(ordinary)
    mla.cache_scale = 2.0
    exact = attended(mla, config, x, torch.bfloat16)
    mla.cache_scale = 1.0
    assert torch.equal(exact, attended(mla, config, x, torch.bfloat16))  # a cache in BF16 has no scale
    mla.kv_a_layernorm.weight.data *= 512  # latents of hundreds, and queries as much smaller
    assert mla.q_a_layernorm is not None
    mla.q_a_layernorm.weight.data /= 512
    assert error(1.0) > 0.3 and error(8.0) < 0.1


def test_a_scaled_cache_generates_recorded_and_not(whole, monkeypatch):
    """Each layer's scale in the engine, in steps that are recorded and in those that are not."""
    prompts, greedy = [[5, 6, 7, 8], list(range(30, 60))], SamplingParams(temperature=0.0, max_tokens=16)
    found = []
    for recorded in (True, False):
        if not recorded:
            monkeypatch.setattr("deepseek_fp4_plugin.kernels.select.recorder", lambda device: None)
        with LLM(str(whole[0]), kv_cache_dtype="fp8", max_seq_len=200) as llm:
            found.append([output.outputs[0].token_ids for output in llm.generate(prompts, greedy)])
    assert found[0] == found[1]


def test_without_calibration_input_scales_are_the_documented_one(small, plain, tmp_path, caplog):  # noqa: F811
    options = {**SETTINGS, "calibration": "none"}
    quantize_checkpoint(small, tmp_path / "none", **options, recipe="max")
    assert caplog.text.count("input scales are not calibrated: every one is 1.0") == 1
    before, after = CheckpointReader(plain), CheckpointReader(tmp_path / "none")
    assert set(before) == set(after)
    for name in before:
        if name.endswith(".input_scale"):
            assert after.get(name) == 1.0
        else:
            assert same(before.get(name), after.get(name)), name
    card = (tmp_path / "none" / "README.md").read_text(encoding="utf-8")
    assert "Input scales were not calibrated. Every one is 1.0" in card
    assert read_json(tmp_path / "none" / "quantization_report.json")["calibration"] == "nothing"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"calibration": "none", "recipe": "gptq"}, "recipe gptq needs more of the inputs than"),
        ({"calibration": "none", "kv_scales": True}, "does not say how large the latents of layer 0 are"),
        ({"calibration": "none", "save_calibration": "kept.json"}, "nothing to save of a calibration that is none"),
        ({"kv_scales": True, "kv_cache": "bf16"}, "a cache in bf16 has no scales"),
        ({"mtp": "fp8"}, "mtp 'fp8' is unknown; choose from bf16, nvfp4"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_what_does_not_go_together_is_refused(small, tmp_path, options, sentence):  # noqa: F811
    with pytest.raises(ValueError, match=sentence):
        quantize_checkpoint(small, tmp_path / "out", **{**SETTINGS, **options})
    assert not (tmp_path / "out").exists()
