"""Recorded decode steps against the same steps run by Python, bit for bit."""

import random

import pytest
import torch

from deepseek_fp4_plugin.engine.recorded_steps import RecordedSteps
from deepseek_fp4_plugin.kernels import cpu, ops
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from tests.engine_core import make_engine, make_request, run_all
from tests.tiny import write_checkpoint

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU extension is not built")
BF16, CPU = torch.bfloat16, torch.device("cpu")


@pytest.mark.parametrize("source", ["fp8", "bf16", "r1_nano"])
@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("cache_dtype", [BF16, torch.float8_e4m3fn], ids=["bf16 cache", "fp8 cache"])
def test_engine_computes_the_same(tmp_path, source, drafts, cache_dtype):
    folder = source if source == "r1_nano" else write_checkpoint(tmp_path / source, fp8=source == "fp8")
    model = DeepseekV3ForCausalLM.from_pretrained(folder)
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 300) for _ in range(rng.randint(1, 40))] for _ in range(12)]
    outputs = []
    for recorded in (True, False):
        engine = make_engine(model, drafts=drafts, batch=8, cache_dtype=cache_dtype)
        steps = [engine.executor.runner.recorded] + ([engine.executor.runner.drafter.recorded] if drafts else [])
        for step in steps:
            step.recorder = step.recorder if recorded else None
        requests = [make_request(i, prompt, 24) for i, prompt in enumerate(prompts)]
        outputs.append(run_all(engine, requests))
        assert all(bool(step._recordings) == recorded for step in steps)
    assert outputs[0] == outputs[1]


def batch_of(tokens: int, requests: int) -> ForwardBatch:
    ids = torch.zeros(tokens, dtype=torch.int64)
    return ForwardBatch(
        input_ids=ids,
        positions=ids,
        slot_mapping=ids,
        block_tables=torch.zeros(requests, 1, dtype=torch.int64),
        context_lens=torch.ones(requests, dtype=torch.int64),
        query_start=torch.arange(requests + 1),
        num_decode_requests=requests,
        num_decode_tokens=tokens,
        max_query=1,
        max_context=1,
    )


def test_replay_reads_new_inputs():
    weight = torch.ones(64, dtype=BF16)
    calls = []

    def function(x, *, batch):
        calls.append(x.shape[0])
        for _ in range(50):
            x = ops.add(x, ops.rms_norm(x, weight, 1e-6))
        return (x,)

    steps = RecordedSteps(function, CPU, cache_blocks=4, block_size=8)
    inputs = [torch.randn(rows, 64).to(BF16) for rows in (2, 3, 2, 3, 2)]
    results = [steps(x, batch=batch_of(x.shape[0], x.shape[0]))[0].clone() for x in inputs]
    assert calls == [2, 3]
    for x, result in zip(inputs, results, strict=True):
        assert torch.equal(result, function(x, batch=None)[0])
    blocks = steps.recorder._memory._blocks
    assert len(blocks) <= 8, "layers must take turns at the same memory"


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
    def function(x, *, batch):
        return (step([x, x]) if step is torch.cat else step(ops.add(x, x)),)

    steps = RecordedSteps(function, CPU, cache_blocks=4, block_size=8)
    assert steps(torch.randn(2, 64).to(BF16), batch=batch_of(2, 2)) is None
    assert steps.recorder is None


def test_an_error_while_recording_or_replaying_is_raised():
    def failing(x, *, batch):
        raise KeyError("from the step")

    steps = RecordedSteps(failing, CPU, cache_blocks=4, block_size=8)
    for _ in range(2):
        with pytest.raises(KeyError, match="from the step"):
            steps(torch.ones(1, 64, dtype=BF16), batch=batch_of(1, 1))

    weight = torch.randn(7, 64).to(BF16)
    steps = RecordedSteps(lambda *, batch: (ops.embedding(batch.input_ids, weight),), CPU, cache_blocks=4, block_size=8)
    good, bad = batch_of(1, 1), batch_of(1, 1)
    bad.input_ids.fill_(7)
    for _ in range(2):
        assert torch.equal(steps(batch=good)[0], weight[:1])
    with pytest.raises(IndexError, match="token id 7 is outside the vocabulary of 7"):
        steps(batch=bad)
    assert torch.equal(steps(batch=good)[0], weight[:1])
