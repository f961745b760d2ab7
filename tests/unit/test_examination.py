"""What is found in a checkpoint from its files and headers: a sentence for each kind of fault."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.reader import INDEX_NAME, CheckpointReader
from deepseek_fp4_plugin.checkpoint.scales import read_scale
from deepseek_fp4_plugin.models.config import with_mtp_layers
from deepseek_fp4_plugin.models.examination import examine
from tests.tiny import CONFIG, FP8_SECTION
from tests.unit.examined import said

UP = "model.layers.1.mlp.experts.3.up_proj"
O_PROJ = "model.layers.1.self_attn.o_proj"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
Tensors = dict[str, torch.Tensor]


def put(**suffixes: torch.Tensor | None) -> Callable[[Tensors], None]:
    """Replace, add or (None) remove tensors of one expert's projection."""

    def edit(tensors: Tensors) -> None:
        for suffix, tensor in suffixes.items():
            tensors.pop(f"{UP}.{suffix}", None)
            if tensor is not None:
                tensors[f"{UP}.{suffix}"] = tensor

    return edit


def test_a_healthy_checkpoint_has_no_findings(look):
    assert look() == []


# ---------------------------------------------------------------- tensors of one weight


def nvfp4(**changes: torch.Tensor | None) -> Callable[[Tensors], None]:
    given: dict[str, torch.Tensor | None] = {
        "weight": torch.zeros(128, 64, dtype=torch.uint8),
        "weight_scale": torch.ones(128, 8).to(E4M3),
        "weight_scale_2": torch.ones(()),
        "input_scale": torch.ones(()),
        "weight_scale_inv": None,
    }
    return put(**{**given, **changes})


ONES = torch.ones(1, 1)
TENSORS = {
    "U8 exponents": (put(weight_scale_inv=torch.full((1, 1), 120, dtype=torch.uint8)), None),
    "E8M0 exponents": (put(weight_scale_inv=torch.ones(1, 1).to(E8M0)), None),
    "BF16 scales": (put(weight_scale_inv=ONES.bfloat16()), None),
    "FP16 scales": (put(weight_scale_inv=ONES.half()), None),
    "I8 scales": (put(weight_scale_inv=ONES.to(torch.int8)), "weight_scale_inv in .* has dtype int8, which is no"),
    "I32 scales": (put(weight_scale_inv=ONES.to(torch.int32)), "weight_scale_inv in .* has dtype int32"),
    "F64 scales": (put(weight_scale_inv=ONES.double()), "weight_scale_inv in .* has dtype float64"),
    "E4M3 scales": (put(weight_scale_inv=ONES.to(E4M3)), "weight_scale_inv in .* has dtype float8_e4m3fn"),
    "E5M2 scales": (put(weight_scale_inv=ONES.to(torch.float8_e5m2)), "weight_scale_inv in .* has dtype float8_e5m2"),
    "BOOL scales": (put(weight_scale_inv=ONES.bool()), "weight_scale_inv in .* has dtype bool"),
    "scale of shape []": (put(weight_scale_inv=torch.ones(())), r"has shape \[\], but config.json implies \[1, 1\]"),
    "finer blocks": (
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(4, 2)}),
        r"has shape \[4, 2\], but config.json implies \[2, 1\].*blocks of 64 x 64, which it fits, are not read",
    ),
    "FP8, a scale a tensor": (
        put(weight_scale_inv=None, weight_scale=torch.ones(())),
        None,
    ),
    "FP8, [1]": (put(weight_scale_inv=None, weight_scale=torch.ones(1)), None),
    "FP8, a scale a row": (put(weight_scale_inv=None, weight_scale=torch.ones(128, 1).bfloat16()), None),
    "FP8, rows as a vector": (put(weight_scale_inv=None, weight_scale=torch.ones(128)), None),
    "FP8, a scale a block": (put(weight_scale_inv=None, weight_scale=ONES), None),
    "FP8, a scale a column": (
        put(weight_scale_inv=None, weight_scale=torch.ones(1, 128)),
        r"\(weight_scale\) has shape \[1, 128\], which is neither one scale for the tensor, nor .* 128 rows",
    ),
    "FP8, rows of another weight": (
        put(weight_scale_inv=None, weight_scale=torch.ones(64, 1)),
        r"\(weight_scale\) has shape \[64, 1\]",
    ),
    "FP8, scales of both names": (put(weight_scale=ONES), "no place for, first .*up_proj.weight_scale;"),
    "another name": (
        put(weight_scale_inv=None, scale=ONES),
        r"weight_scale_inv is missing.*\(scale is not known here\)",
    ),
    "compressed-tensors NVFP4": (
        nvfp4(
            weight=None,
            weight_scale_2=None,
            input_scale=None,
            weight_packed=torch.zeros(128, 64, dtype=torch.uint8),
            weight_global_scale=torch.ones(1),
            input_global_scale=torch.ones(1),
        ),
        None,
    ),
    "compressed-tensors NVFP4, other blocks": (
        nvfp4(
            weight=None,
            weight_scale_2=None,
            input_scale=None,
            weight_packed=torch.zeros(128, 64, dtype=torch.uint8),
            weight_scale=torch.ones(128, 4).to(E4M3),
            weight_global_scale=torch.ones(1),
        ),
        r"weight_scale in .* has shape \[128, 4\]",
    ),
    "compressed-tensors INT4": (
        put(weight=None, weight_scale_inv=None, weight_packed=torch.zeros(128, 16, dtype=torch.int32)),
        "is a packed weight of compressed-tensors",
    ),
    "GPTQ": (
        put(weight=None, weight_scale_inv=None, qweight=torch.zeros(16, 128, dtype=torch.int32)),
        "is a weight of GPTQ or AWQ",
    ),
    "INT8": (
        put(weight=torch.zeros(128, 128, dtype=torch.int8), weight_scale_inv=None, weight_scale=torch.ones(128, 1)),
        r"up_proj.weight in .* has dtype int8 \(beside it: weight_scale\)",
    ),
    "MXFP4": (
        nvfp4(weight_scale=torch.zeros(128, 4, dtype=torch.uint8), weight_scale_2=None, input_scale=None),
        r"is 4-bit with one exponent a block \(MXFP4\)",
    ),
    "FP8 as bytes": (put(weight=torch.zeros(128, 128, dtype=torch.uint8)), "is uint8 beside weight_scale_inv"),
    "E5M2": (put(weight=torch.zeros(128, 128).to(torch.float8_e5m2)), "has dtype float8_e5m2"),
    "BF16 with a scale": (
        put(weight=torch.zeros(128, 128).bfloat16()),
        "is a scale, but the weight beside it is bfloat16",
    ),
    "NVFP4, scales of shape [1]": (nvfp4(weight_scale_2=torch.ones(1), input_scale=torch.ones(1)), None),
    "NVFP4, a scale a row": (nvfp4(weight_scale_2=torch.ones(128)), r"weight_scale_2 in .* has shape \[128\]"),
    "NVFP4, U8 block scales": (
        nvfp4(weight_scale=torch.zeros(128, 8, dtype=torch.uint8)),
        "weight_scale in .* has dtype uint8, which is no weight_scale: it must be float8_e4m3fn",
    ),
    "NVFP4, integer scale": (
        nvfp4(weight_scale_2=torch.ones((), dtype=torch.int32)),
        "weight_scale_2 in .* has dtype int32",
    ),
    "NVFP4, blocks of 32": (nvfp4(weight_scale=torch.ones(128, 4).to(E4M3)), r"has shape \[128, 4\].*\[128, 8\]"),
    "a bias": (put(bias=torch.zeros(128)), "no place for, first .*up_proj.bias"),
    "norm in FP8": (
        lambda t: t.update(
            {"model.norm.weight": torch.ones(128).to(E4M3), "model.norm.weight_scale_inv": torch.ones(1)}
        ),
        "model.norm.weight in .* is fp8_block, which this program reads for linear layers only",
    ),
    "integer router bias": (
        lambda t: t.update({"model.layers.1.mlp.gate.e_score_correction_bias": torch.ones(16, dtype=torch.int32)}),
        "e_score_correction_bias in .* has dtype int32",
    ),
    "router bias of another size": (
        lambda t: t.update({"model.layers.1.mlp.gate.e_score_correction_bias": torch.ones(8)}),
        r"e_score_correction_bias in .* has shape \[8\], but config.json implies \[16\]",
    ),
}


@pytest.mark.parametrize(("edit", "message"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors_of_a_weight(look, edit, message):
    lines = said(look(edit))
    if message is None:
        assert lines == []
    else:
        assert len(lines) == 1 and lines[0].startswith("error: ")
        assert re.search(message, lines[0]), lines[0]


def test_equal_faults_of_many_tensors_are_one_finding(look):
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale_inv")]:
            tensors[name.replace("weight_scale_inv", "scale")] = tensors.pop(name)

    (finding,) = look(edit)
    assert finding.count == 176 and "(175 more like it)" in str(finding)


def test_looking_goes_on_after_the_first(look):
    def edit(tensors: Tensors) -> None:
        put(weight_scale_inv=torch.ones(1, 1, dtype=torch.int8))(tensors)
        del tensors["model.norm.weight"]
        tensors["model.layers.9.x"] = torch.ones(1)

    lines = said(look(edit, files={"hf_quant_config.json": {"quantization": None}}, num_key_value_heads=2))
    for part in (
        "int8",
        "no tensor model.norm.weight",
        "model.layers.9.x",
        "quantization is null",
        "num_key_value_heads",
    ):
        assert any(part in line for line in lines), part
    assert len(lines) == 5 and lines[-1].startswith("warning: ")


def test_an_error_says_how_many_more_there_are(look, tmp_path):
    look(put(weight_scale_inv=None), files={"hf_quant_config.json": "{"})
    with pytest.raises(CheckpointError, match=r"hf_quant_config.json is not valid JSON.*\[and 1 more finding: "):
        examine(tmp_path).usable()


# ---------------------------------------------------------------- scales' values


@pytest.mark.parametrize("dtype", [torch.uint8, E8M0], ids=["U8", "F8_E8M0"])
def test_exponent_bytes_are_powers_of_two(tmp_path, dtype):
    """All 256: against torch's own E8M0."""
    raw = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    save_file({"x.weight_scale_inv": raw.view(dtype)}, tmp_path / "model.safetensors")
    scale = read_scale(CheckpointReader(tmp_path), "x.weight_scale_inv")
    expected = torch.tensor([2.0 ** (byte - 127) for byte in range(255)] + [float("nan")], dtype=torch.float32)
    assert scale.dtype is torch.float32 and torch.equal(scale.flatten()[:255], expected[:255])
    assert torch.isnan(scale[15, 15])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x.weight_scale_inv", torch.tensor([[1.0, -1.0]])),
        ("x.weight_scale", torch.tensor([[1.0, -1.0]]).to(E4M3)),
        ("x.weight_scale_2", torch.tensor(-1.0)),
        ("x.input_scale", torch.tensor([-1.0])),
        ("x.weight_scale_inv", torch.tensor([[float("-inf")]])),
    ],
)
def test_negative_scales_are_refused(tmp_path, name, value):
    save_file({name: value}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} in .* holds a negative number.* download model.safetensors"):
        read_scale(CheckpointReader(tmp_path), name)


def test_zero_and_minus_zero_are_scales(tmp_path):
    value = torch.tensor([[0.0, -0.0]])
    save_file({"x.weight_scale_inv": value, "y.weight_scale": value.to(E4M3)}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    assert not read_scale(reader, "x.weight_scale_inv").any()
    assert not read_scale(reader, "y.weight_scale").float().any()


# ---------------------------------------------------------------- what is not used


def test_cache_scales_and_frequencies_are_said(look):
    def edit(tensors: Tensors) -> None:
        for layer in range(3):
            name = f"model.layers.{layer}.self_attn"
            tensors[f"{name}.k_scale"] = tensors[f"{name}.v_scale"] = torch.ones(())
            tensors[f"{name}.rotary_emb.inv_freq"] = torch.ones(8)
        tensors[f"{UP}.input_scale"] = torch.ones(())

    findings = look(lambda t: edit(t) or t.update({k: v.clone() for k, v in t.items()}))
    assert all(finding.unused and finding.severity == "note" for finding in findings)
    assert sorted(finding.count for finding in findings) == [1, 3, 6]
    assert any("a scale of the K/V cache" in line and "(5 more like it)" in line for line in said(findings))


def mtp_layer(layer: int) -> Callable[[Tensors], None]:
    """A second MTP layer."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            tensors[name.replace("layers.3.", f"layers.{layer}.")] = tensors[name].clone()

    return edit


def without_mtp(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("model.layers.3.")]:
        del tensors[name]


def without_projection(tensors: Tensors) -> None:
    del tensors["model.layers.3.eh_proj.weight"]


NOTHING: Callable[[Tensors], None] = lambda tensors: None  # noqa: E731
MTP = {
    "not counted": (NOTHING, 0, "warning: the 124 tensors of model.layers.3 .* not used: config.json counts 0", 0),
    "counted null": (NOTHING, None, "warning: the 124 tensors of model.layers.3 .* set it to 1 to keep", 0),
    "key absent": (NOTHING, ..., "warning: .* does not say num_nextn_predict_layers; model.layers.3 is taken as", 1),
    "gone": (without_mtp, 1, "warning: .* counts 1 MTP layer .* but no tensor of model.layers.3 is here", 0),
    "two gone": (without_mtp, 2, "warning: .* counts 2 MTP layers .* used without", 0),
    "gone and key absent": (without_mtp, ..., None, 0),
    "incomplete": (without_projection, 1, "error: .* no tensor model.layers.3.eh_proj.weight", None),
    "incomplete, not counted": (without_projection, 0, "warning: the 123 tensors of model.layers.3 .* not used", 0),
    "two": (mtp_layer(4), 2, "error: .*num_nextn_predict_layers is 2, and this program computes one", None),
    "two counted, one there": (NOTHING, 2, "error: .*num_nextn_predict_layers is 2, and", None),
    "two there, one counted": (mtp_layer(4), 1, "warning: the 124 tensors of model.layers.4 .* one is computed", 1),
    "two there, none counted": (mtp_layer(4), 0, "warning: the 248 tensors of model.layers.3 and model.layers.4", 0),
}


@pytest.mark.parametrize(("edit", "count", "message", "left"), MTP.values(), ids=MTP.keys())
def test_mtp_layers_and_their_count_agree_or_it_is_said(look, tmp_path, edit, count, message, left):
    content = CONFIG | {"quantization_config": FP8_SECTION, "num_nextn_predict_layers": count}
    if count is ...:
        del content["num_nextn_predict_layers"]
    lines = said(look(edit, files={"config.json": content}))
    assert len(lines) == (message is not None)
    assert message is None or re.match(message, lines[0]), lines
    if left is not None:
        config, _ = examine(tmp_path).usable()
        assert config.num_nextn_predict_layers == left


@pytest.mark.parametrize(("layers", "count"), [(4, 1), (4, 0), (2, 1), (2, 0)])
def test_the_mtp_layer_taken_for_a_decoder_layer_or_the_reverse(look, layers, count):
    lines = said(look(num_hidden_layers=layers, num_nextn_predict_layers=count))
    assert f"num_hidden_layers is {layers}, but the first MTP layer" in lines[0]
    assert "set num_hidden_layers to 3 and num_nextn_predict_layers to 1" in lines[0]


def test_the_written_config_counts_what_is_there():
    assert with_mtp_layers({"num_nextn_predict_layers": 1, "x": 2}, 0) == {"num_nextn_predict_layers": 0, "x": 2}
    assert with_mtp_layers({"num_mtp_layers": 1}, 0) == {"num_mtp_layers": 0}
    assert with_mtp_layers({}, 1) == {"num_nextn_predict_layers": 1}
    assert with_mtp_layers({}, 0) == {}
    same = {"b": 1, "num_nextn_predict_layers": 1, "a": 2}
    assert json.dumps(with_mtp_layers(same, 1)) == json.dumps(same)


# ---------------------------------------------------------------- index and shards


@pytest.fixture
def sharded(tensors, tmp_path):
    """Two shards and an index, changed by a function of (file -> tensors, weight_map); the folder."""

    def write(edit: Callable[[dict[str, Tensors], dict[str, Any]], Any]) -> Path:
        first = {name: tensor for name, tensor in tensors.items() if ".layers.1." in name}
        files = {FIRST: first, SECOND: {name: t for name, t in tensors.items() if name not in first}}
        weight_map: dict[str, Any] = {name: file for file, held in files.items() for name in held}
        index = edit(files, weight_map)
        for file, held in files.items():
            (tmp_path / file).parent.mkdir(exist_ok=True)
            save_file(held, tmp_path / file, {"format": "pt"})
        (tmp_path / INDEX_NAME).write_text(index if isinstance(index, str) else json.dumps({"weight_map": weight_map}))
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": FP8_SECTION}))
        return tmp_path

    return write


@pytest.mark.parametrize("name", ["abliterated.safetensors", "model-overlay.safetensors"])
def test_the_index_decides_between_copies(sharded, name):
    """Whether the newer copy's file sorts before or behind the older one's."""

    def overlay(files, weight_map):
        held = [f"{O_PROJ}.weight", f"{O_PROJ}.weight_scale_inv"]
        files[name] = {tensor: torch.zeros_like(files[FIRST][tensor]) for tensor in held}
        weight_map.update(dict.fromkeys(held, name))

    folder = sharded(overlay)
    (line,) = said(list(examine(folder).findings))
    assert f"is read from {name}, as {INDEX_NAME} says; the copy in {FIRST} is not used (1 more like it)" in line
    reader = CheckpointReader(folder)
    assert not reader.get(f"{O_PROJ}.weight").float().any() and not reader.get(f"{O_PROJ}.weight_scale_inv").any()


def bf16_overlay(files, weight_map):
    files["overlay.safetensors"] = {f"{O_PROJ}.weight": torch.zeros(128, 128).bfloat16()}
    weight_map[f"{O_PROJ}.weight"] = "overlay.safetensors"
    del weight_map[f"{O_PROJ}.weight_scale_inv"]


def test_the_scale_of_a_replaced_weight_is_not_used(sharded):
    lines = said(list(examine(sharded(bf16_overlay)).findings))
    assert any(
        f"{O_PROJ}.weight_scale_inv" in line and "another shard, without scales; it is not used" in line
        for line in lines
    )
    assert not any(line.startswith("error") for line in lines)


def test_a_copy_that_the_index_cannot_decide(sharded):
    def twice(files, weight_map):
        files["other.safetensors"] = {"model.norm.weight": files[SECOND]["model.norm.weight"], "x": torch.ones(1)}
        weight_map["x"] = "other.safetensors"
        del weight_map["model.norm.weight"]

    with pytest.raises(CheckpointError, match=rf"model.norm.weight in .* is in {SECOND} and in other.safetensors and"):
        CheckpointReader(sharded(twice))


def test_scales_that_the_index_does_not_name_are_read_and_noted(sharded):
    def forget(files, weight_map):
        for name in [name for name in weight_map if name.endswith("weight_scale_inv")]:
            del weight_map[name]

    folder = sharded(forget)
    (finding,) = examine(folder).findings
    assert finding.severity == "note" and finding.count == 176 and "not named by" in finding.sentence
    assert f"{UP}.weight_scale_inv" in CheckpointReader(folder)


def test_an_mtp_layer_in_a_file_of_its_own_that_the_index_does_not_name(sharded):
    def aside(files, weight_map):
        names = [name for name in files[SECOND] if name.startswith("model.layers.3.")]
        files["mtp.safetensors"] = {name: files[SECOND].pop(name) for name in names}
        for name in names:
            del weight_map[name]

    lines = said(list(examine(sharded(aside)).findings))
    assert len(lines) == 2 and all(line.startswith("warning: ") for line in lines)
    assert f"mtp.safetensors is not named by {INDEX_NAME} and not used: it holds 124 tensors" in lines[0]
    assert "counts 1 MTP layer" in lines[1]


def test_a_shard_beside_a_single_file_is_said(look, tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "extra.safetensors")
    (line,) = said(look())
    assert "extra.safetensors is not named by" in line and "1 tensors that no other shard has, first x" in line


def test_shards_in_a_subfolder_are_read(sharded, tensors):
    def move(files, weight_map):
        files["sub/x.safetensors"] = files.pop(FIRST)
        for name, file in weight_map.items():
            if file == FIRST:
                weight_map[name] = "./sub/x.safetensors" if name == f"{UP}.weight" else "sub/x.safetensors"

    folder = sharded(move)
    assert examine(folder).findings == ()
    reader = CheckpointReader(folder)
    assert reader.shards == [SECOND, "sub/x.safetensors"]
    assert torch.equal(reader.get(f"{UP}.weight").view(torch.uint8), tensors[f"{UP}.weight"].view(torch.uint8))


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "sub/../x.safetensors", "a\\b", "", 5, None, ["a"], {}, True]
)
def test_shards_outside_the_folder_and_no_names_are_refused(sharded, shard):
    folder = sharded(lambda files, weight_map: weight_map.update({"model.norm.weight": shard}))
    with pytest.raises(CheckpointError) as error:
        CheckpointReader(folder)
    assert f"weight_map gives {json.dumps(shard)} for model.norm.weight, expected the path of a shard inside" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "index.json gives 'a' twice"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ("{}", "has no weight_map"),
        ("[]", "holds a JSON list, expected an object"),
        ("{", "is not valid JSON"),
        ("\ufeff{}", "is not valid JSON"),
    ],
)
def test_an_index_that_is_none(sharded, index, message):
    with pytest.raises(CheckpointError, match=message) as error:
        CheckpointReader(sharded(lambda files, weight_map: index))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("total", ["abc", -1, 1.5, True, [], {}])
def test_a_total_size_that_is_none_is_noted(sharded, total):
    folder = sharded(
        lambda files, weight_map: json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    (finding,) = examine(folder).findings
    assert finding.severity == "note" and f"total_size is {json.dumps(total)}" in str(finding)


def test_every_damaged_shard_is_named(sharded):
    folder = sharded(lambda files, weight_map: None)
    for shard in (FIRST, SECOND):
        (folder / shard).write_bytes((folder / shard).read_bytes()[:-5])
    lines = said(list(examine(folder).findings))
    assert len(lines) == 2 and FIRST in lines[0] and SECOND in lines[1]
    (folder / "config.json").unlink()
    assert len(examine(folder).findings) == 3


def test_without_a_shard_its_tensors_are_not_named_one_by_one(sharded):
    folder = sharded(lambda files, weight_map: None)
    (folder / FIRST).unlink()
    assert [finding.subject for finding in examine(folder).findings] == [FIRST]
