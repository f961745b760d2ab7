"""humming-kernels loads the checkpoints of every recipe, and multiplies by the values that we do; as a backend, too.

It compiles each kernel for seconds: sizes are chosen so that the file needs eleven.
"""

import pytest
import torch

from deepseek_fp4_plugin import LLM, SamplingParams
from deepseek_fp4_plugin.assets.held_out import grade, load_held_out
from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.kernels import humming, ops, select
from deepseek_fp4_plugin.kernels.weights import Case, WeightTensors
from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint
from deepseek_fp4_plugin.quantization.recipes import RECIPES
from tests.parity.kernel_cases import TWO_STEPS, error, random_part
from tests.stops import SETTINGS
from tests.tiny import tiny_config, write_checkpoint
from training.tokenizer import write_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BF16, DEVICE = torch.bfloat16, torch.device("cuda")
NVFP4 = WeightFormat.NVFP4
MODULES = ("model.layers.0.mlp.gate_proj", "model.layers.1.mlp.experts.1.down_proj")
# Sizes are multiples of humming's tiles, and both modules of one shape.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2}
# Outputs and inputs that its layout has not: filled up to 256 and 1152, which it would cut over multiprocessors.
OUT, WIDTH, EXPERTS = 144, 1040, 40


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("humming") / "source"
    write_checkpoint(folder, tiny_config(vocab_size=1024, **WIDE))
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_loads_and_multiplies_alike(recipe, source, tmp_path):
    """In the mean ours within the result's rounding to BF16, humming's within two: its tuning may take stream-K, which
    rounds parts of sums to BF16, too. A weight times its scale fits BF16 exactly."""
    layers = pytest.importorskip("humming.layer", reason="humming-kernels is not installed")
    tune = pytest.importorskip("humming.tune")
    quantize_checkpoint(source, tmp_path / "out", **SETTINGS, recipe=recipe)
    reader, device = CheckpointReader(tmp_path / "out"), torch.device("cuda")
    for module in MODULES:
        weight, scale, scale_2 = (
            reader.get(f"{module}.{part}") for part in ("weight", "weight_scale", "weight_scale_2")
        )
        out, width = weight.shape[0], 2 * weight.shape[1]
        config = {"quant_method": "modelopt", "quant_algo": "nvfp4"}
        theirs = layers.HummingLayer(
            shape_n=out, shape_k=width, weight_config=config, torch_dtype=torch.bfloat16
        ).cuda()
        theirs.load_from_tensors(
            {"weight": weight.cuda(), "weight_scale": scale.cuda(), "weight_scale_2": scale_2.cuda().view(1)}
        )
        theirs.transform()
        rows = torch.randn(64, width, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
        parts = [WeightTensors(WeightFormat.NVFP4, weight, scale, scale_2)]
        ours = ops.linear(rows, ops.prepare(parts, device, torch.bfloat16)).float()
        # Of the kernels that it has for a shape, the one for so many rows alone is compiled.
        tuned = tune.get_heuristics_config(theirs.humming_config, shape_m=64)
        exact = ops.linear(rows.float(), ops.prepare(parts, device, torch.bfloat16, backend="reference"))
        assert (ours - exact).norm() / exact.norm() < 2**-9
        assert (theirs(rows, tuning_config=tuned).float() - exact).norm() / exact.norm() < 2**-8


@pytest.fixture
def backend(monkeypatch):
    refused = humming.refuses(Case(DEVICE, BF16, NVFP4))
    if refused:
        pytest.skip(refused)
    use_rows(monkeypatch, 512)


def use_rows(monkeypatch, *rows: int) -> None:
    """Kernels for so many rows alone; the last serves all that are more."""
    monkeypatch.setattr("deepseek_fp4_plugin.kernels.humming.tuning.ROWS", rows)
    monkeypatch.setattr("deepseek_fp4_plugin.kernels.humming.tuning.ROWS_OF_EXPERTS", rows)


def both(parts: list[WeightTensors]):
    return tuple(ops.prepare(parts, DEVICE, BF16, backend=name) for name in ("humming", "reference"))


def within(bound: float, errors: dict) -> None:
    """Says all of them where one is too large."""
    assert all(found <= bound for found in errors.values()), {case: f"{e / bound:.2f}" for case, e in errors.items()}


def test_linear(backend, monkeypatch):
    """Parts of different tensor scales, rows that lie apart, the kernels of few and of many rows; no order of summing
    that differs from call to call."""
    use_rows(monkeypatch, 8, 512)
    errors = {}
    for scales in ((2e-3,), (2e-3, 5e-4)):
        ours, law = both([random_part(NVFP4, OUT, WIDTH, scale_2=scale) for scale in scales])
        for rows in (0, 1, 5, 70, 300):
            x = torch.randn(rows, WIDTH + 24, device=DEVICE).to(BF16)[:, 8 : 8 + WIDTH]
            y = ops.linear(x, ours)
            errors[len(scales), rows] = error(y, ops.linear(x, law))
            assert all(torch.equal(ops.linear(x, ours), y) for _ in range(10)), (len(scales), rows)
    within(TWO_STEPS, errors)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_a_device_that_is_not_the_current_one(backend):
    part, x = random_part(NVFP4, OUT, WIDTH), torch.randn(5, WIDTH).to(BF16)
    devices = [torch.device("cuda", index) for index in (0, 1)]
    first, second = (ops.linear(x.to(d), ops.prepare([part], d, BF16, backend="humming")) for d in devices)
    assert torch.equal(first.cpu(), second.cpu())


def test_one_expert_of_a_stack(backend):
    ours, law = both([random_part(NVFP4, OUT, WIDTH, EXPERTS)])
    x = torch.randn(5, WIDTH, device=DEVICE).to(BF16)
    pairs = {e: (humming.linear(x, ours, e), law.backend.linear(x, law, e)) for e in (0, 1, EXPERTS - 1)}
    within(TWO_STEPS, {expert: error(*pair) for expert, pair in pairs.items()})


def test_experts(backend):
    """Choices of experts that are elsewhere, experts that nobody chose; a graph gives the same bits."""
    (a, c), (b, d) = (
        both([random_part(NVFP4, OUT, WIDTH, EXPERTS) for _ in range(2)]),
        both([random_part(NVFP4, WIDTH, OUT, EXPERTS)]),
    )
    errors, k = {}, 3
    for tokens in (0, 1, 5, 64, 700):
        ids = torch.stack([torch.randperm(EXPERTS)[:k] for _ in range(tokens)]) if tokens else torch.empty(0, k).long()
        ids[1:3, :2] = -1
        ids, weights = ids.to(DEVICE), torch.rand(tokens, k, device=DEVICE)
        x = torch.randn(tokens, WIDTH, device=DEVICE).to(BF16) * 0.1
        actual = ops.experts_mlp(x, ids, weights, a, b)
        errors[tokens] = error(actual, ops.experts_mlp(x, ids, weights, c, d))
        if tokens == 64:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = ops.experts_mlp(x, ids, weights, a, b)
            for _ in range(10):
                graph.replay()
                assert torch.equal(captured, actual)
    within(2 * TWO_STEPS, errors)


def test_products_by_head(backend):
    heads, nope, v = 3, 32, 16  # OUT in all
    ours, law = both([random_part(NVFP4, heads * (nope + v), WIDTH)])
    q, attended = (torch.randn(7, heads, width, device=DEVICE).to(BF16) for width in (nope, WIDTH))
    errors = {
        "absorb": error(ops.absorb(q, ours), ops.absorb(q, law)),
        "values": error(ops.values_from_latent(attended, ours, v), ops.values_from_latent(attended, law, v)),
    }
    within(TWO_STEPS, errors)


def test_other_formats_are_refused(backend):
    with pytest.raises(ValueError, match="'humming' multiplies NVFP4 weights by BF16 activations"):
        ops.prepare([random_part(WeightFormat.PLAIN, 64, 64)], DEVICE, BF16, backend="humming")


def test_a_whole_engine(tmp_path, backend, monkeypatch):
    """r1_nano as a GPU for which we have no kernels of our own would run it: graphs and drafts included."""
    quantize_checkpoint("r1_nano", tmp_path / "nvfp4", calibration="builtin", device="cuda")
    entries = sorted(select.TABLE, key=lambda entry: entry.name != "humming")
    monkeypatch.setattr(select, "TABLE", tuple(entry for entry in entries if entry.name != "cuda"))
    select.kernels.cache_clear()
    chosen = select.choose(Case(DEVICE, BF16, NVFP4)).name
    assert (chosen, select.choose(Case(DEVICE, BF16)).name) == ("humming", "decoded")
    problems = load_held_out()[:60]
    try:
        with LLM(tmp_path / "nvfp4", device="cuda", speculative_config={"num_nextn_predict_layers": 3}) as llm:
            prompts = [llm.tokenizer.encode_chat([{"role": "user", "content": p.prompt}]) for p in problems]
            outputs = llm.generate(prompts, SamplingParams(max_tokens=1024))
    finally:
        select.kernels.cache_clear()
    right = sum(grade(p.answer, o.outputs[0].text) for p, o in zip(problems, outputs, strict=True))
    assert right >= 58, f"{right} of {len(problems)} right"
