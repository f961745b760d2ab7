"""Recorded steps against the same steps run by Python, bit for bit."""

import random

import pytest
import torch

from deepseek_fp4_plugin.engine.recorded_steps import Sizes
from deepseek_fp4_plugin.engine.step_plan import Sampling
from deepseek_fp4_plugin.kernels import cpu, ops
from deepseek_fp4_plugin.kernels.recording import Unrecordable, cut
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from tests.engine_core import make_engine, make_request, run_all
from tests.tiny import write_checkpoint

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU extension is not built")
BF16 = torch.bfloat16
NEVER, EXACT, PADDED = Sizes(()), Sizes((1, 2, 3, 4, 5)), Sizes((2, 5), padded=True)


def outputs_of(model, sizes: Sizes, **setup) -> dict[int, list[int]]:
    """Of twelve requests, some of them drawn, with proof that steps were replayed or were not."""
    rng = random.Random(0)
    engine = make_engine(model, batch=5, sizes=sizes, **setup)
    requests = []
    for i in range(12):
        sampling = Sampling(greedy=False, seed=i, top_p=0.9) if i >= 8 else Sampling()
        requests.append(make_request(i, [rng.randrange(5, 300) for _ in range(rng.randint(1, 40))], 24, sampling))
    outputs = run_all(engine, requests)
    recorded = engine.executor.runner.recorded
    assert bool(recorded.recordings) == bool(sizes.sizes) and (recorded.num_replays > 10) == bool(sizes.sizes)
    return outputs


@pytest.mark.parametrize("source", ["fp8", "bf16", "r1_nano"])
@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("cache_dtype", [BF16, torch.float8_e4m3fn], ids=["bf16 cache", "fp8 cache"])
def test_engine_computes_the_same(tmp_path, source, drafts, cache_dtype):
    folder = source if source == "r1_nano" else write_checkpoint(tmp_path / source, fp8=source == "fp8")
    model = DeepseekV3ForCausalLM.from_pretrained(folder)
    setup = {"drafts": drafts, "cache_dtype": cache_dtype}
    expected = outputs_of(model, NEVER, **setup)
    assert outputs_of(model, EXACT, **setup) == expected
    assert outputs_of(model, PADDED, **setup) == expected
    # Overlapped steps have other rows beside each other, whose sums in BF16 are not the same bits.
    assert outputs_of(model, PADDED, overlap=True, **setup) == outputs_of(model, NEVER, overlap=True, **setup)
    # Where the host reads nothing, draws may differ where logits are equal.
    overlapped = outputs_of(model, PADDED, overlap=True, reads=False, **setup)
    assert overlapped == outputs_of(model, NEVER, overlap=True, reads=False, **setup)
    if cpu.path() == "avx512":  # of these prompts, also what another schedule gives
        assert overlapped == outputs_of(model, NEVER, reads=False, **setup)


@pytest.mark.parametrize("source", ["fp8", "bf16"])
@pytest.mark.parametrize("drafts", [0, 2])
def test_many_rows_are_recorded_around_what_the_platform_computes(tmp_path, source, drafts):
    """By BF16 and FP32 weights more than 16 rows are the platform's product on some processors."""
    model = DeepseekV3ForCausalLM.from_pretrained(write_checkpoint(tmp_path / source, fp8=source == "fp8"))

    def outputs(sizes: Sizes) -> dict[int, list[int]]:
        engine = make_engine(model, batch=24, sizes=sizes, drafts=drafts, cache_dtype=BF16, blocks=256)
        found = run_all(engine, [make_request(i, [5 + i, 9, 2 * i], 20) for i in range(24)])
        recorded = engine.executor.runner.recorded
        assert {key[0] for key in recorded.recordings} <= {24} and bool(recorded.num_replays) == bool(sizes.sizes)
        return found

    assert outputs(Sizes((24,))) == outputs(NEVER)


def record(function):
    return cpu.Recorder().record(function)


def test_replay_reads_new_inputs():
    weight, x = torch.ones(64, dtype=BF16), torch.randn(3, 64).to(BF16)

    def function():
        y = x
        for _ in range(50):
            y = ops.add(y, ops.rms_norm(y, weight, 1e-6))
        return (y,)

    recorder = cpu.Recorder()
    replay, _ = recorder.record(function)
    for _ in range(3):
        x.copy_(torch.randn(3, 64))
        assert torch.equal(replay()[0], function()[0])
    assert len(recorder._memory._blocks) <= 8, "layers must take turns at the same memory"


def test_a_recording_is_cut_where_other_work_must_be_done():
    weight, x, scale = torch.randn(64).to(BF16), torch.randn(3, 64).to(BF16), torch.ones(1)
    worked = []

    def work(y):
        worked.append(y.shape)
        return (y * scale.to(BF16), y.sum(1))  # torch's own arithmetic; the second result is not used again

    def function():
        y = ops.rms_norm(x, weight, 1e-6)
        y, total = cut(work, y)
        z = ops.add(y, x)
        (z,) = cut(lambda z: (z.flip(0),), z)
        return ops.add(z, x), total

    replay, first = record(function)
    for factor in (2.0, -3.0):
        scale.fill_(factor)
        x.copy_(torch.randn(3, 64))
        before = len(worked)
        results = replay()
        assert len(worked) == before + 1
        assert [r.data_ptr() for r in results] == [r.data_ptr() for r in first]
        for result, expected in zip(results, function(), strict=True):
            assert torch.equal(result, expected)


@torch.inference_mode()
def test_layers_take_turns_at_the_memory_around_cuts():
    """Fifty layers, whose results stay where they are, in no more places than two need."""
    x, places = torch.randn(64, 64).to(BF16), set()

    def function():
        y = x
        for _ in range(50):
            (y,) = cut(lambda y: (y.float().cos().to(BF16),), ops.add(y, x))
            places.add(y.data_ptr())
        return (y,)

    replay, _ = record(function)
    assert 0 < len(places) <= 3
    expected = function()[0].clone()
    assert torch.equal(replay()[0], expected) and torch.equal(replay()[0], expected)


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x * 2,
        lambda x: torch.zeros_like(x).add_(x),
        lambda x: x[torch.tensor([0])],
        lambda x: x.t().contiguous(),
        lambda x: x.t().reshape(-1),
        lambda x: x.float(),
        lambda x: torch.tensor([1.0]),
        torch.cat,
    ],
)
@torch.inference_mode()
def test_what_torch_computes_is_not_recorded(step):
    x = torch.randn(2, 64).to(BF16)
    with pytest.raises(Unrecordable):
        record(lambda: (step([x, x]) if step is torch.cat else step(ops.add(x, x)),))


def test_a_model_without_native_kernels_goes_on_unrecorded(tiny_fp8):
    model = DeepseekV3ForCausalLM.from_pretrained(tiny_fp8, dtype="float32")
    engine = make_engine(model)
    assert len(run_all(engine, [make_request(0, [5, 6, 7])])[0]) == 16
    assert engine.executor.runner.recorded.recorder is None


def test_an_error_while_recording_or_replaying_is_raised():
    def failing():
        raise KeyError("from the step")

    for _ in range(2):
        with pytest.raises(KeyError, match="from the step"):
            record(failing)

    weight, ids = torch.randn(7, 64).to(BF16), torch.zeros(1, dtype=torch.int64)
    replay, _ = record(lambda: (ops.embedding(ids, weight),))
    assert torch.equal(replay()[0], weight[:1])
    ids.fill_(7)
    with pytest.raises(IndexError, match="token id 7 is outside the vocabulary of 7"):
        replay()
    ids.fill_(0)
    assert torch.equal(replay()[0], weight[:1])
