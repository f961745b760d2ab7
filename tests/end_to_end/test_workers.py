"""Ranks in processes of their own: what is asked of several is what one gives, and none is left behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from deepseek_fp4_plugin import LLM, SamplingParams, SchedulingParams
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.engine.async_engine import EngineDeadError
from deepseek_fp4_plugin.engine.heartbeat import SILENCE

PROMPTS = ["Hello, my name is", "1 + 2 =", "The capital of France", "日期", "A long one, " * 9]
SETTINGS = dict(
    dtype="float32",
    max_batch_size=4,
    max_seq_len=400,
    speculative_config={"decoding_type": "MTP", "num_nextn_predict_layers": 2},
)


def workers(parent: int | None = None) -> list[psutil.Process]:
    """Worker processes below a process; they are its children."""
    children = psutil.Process(parent).children(recursive=True)
    return [p for p in children if p.is_running() and "worker_process" in " ".join(p.cmdline())]


@pytest.fixture(scope="module")
def one(tiny_with_tokenizer):
    with LLM(tiny_with_tokenizer, **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def two(tiny_with_tokenizer):
    """Two tensor-parallel ranks."""
    with LLM(tiny_with_tokenizer, tensor_parallel_size=2, **SETTINGS) as llm:
        assert len(workers()) == 2
        yield llm


def test_two_ranks_give_what_one_gives(one, two):
    params = SamplingParams(max_tokens=24, logprobs=2)
    for alone, together in zip(one.generate(PROMPTS, params), two.generate(PROMPTS, params), strict=True):
        assert together.text == alone.text
        for a, b in zip(alone.outputs[0].logprobs, together.outputs[0].logprobs, strict=True):
            assert a.keys() == b.keys()
            assert max(abs(a[token].logprob - b[token].logprob) for token in a) < 1e-4


def test_stop_strings_aborts_and_deadlines(one, two):
    text = one.generate(PROMPTS[0], SamplingParams(max_tokens=24)).text
    stop = SamplingParams(max_tokens=24, stop=text[5:8])
    assert two.generate(PROMPTS[0], stop).text == one.generate(PROMPTS[0], stop).text == text[: text.index(text[5:8])]
    long = SamplingParams(max_tokens=300, ignore_eos=True)
    handle = two.generate_async(PROMPTS[0], long, streaming=True)
    next(iter(handle))
    handle.abort()
    assert handle.result().outputs[0].finish_reason == "cancelled"
    assert two.generate(PROMPTS[0], long, timeout=0.05).outputs[0].finish_reason == "timeout"
    assert two.get_stats().cache_blocks_used == 0


@pytest.mark.parametrize(
    ("blow", "told", "limit"),
    [
        (signal.SIGKILL, "SIGKILL", 3),
        pytest.param(signal.SIGSTOP, "has not answered", SILENCE + 3, marks=pytest.mark.proof),
    ],
)
def test_a_lost_rank_ends_its_requests_and_the_engine_starts_anew(one, two, blow, told, limit):
    """A dead rank is known at once, a stopped one by its silence; the other rank is freed in either case."""
    expected = one.generate(PROMPTS[1], SamplingParams(max_tokens=8)).text
    victim, other = workers()
    handle = two.generate_async(PROMPTS[0], SamplingParams(max_tokens=300, ignore_eos=True), streaming=True)
    next(iter(handle))
    began = time.monotonic()
    victim.send_signal(blow)
    with pytest.raises(EngineDeadError, match=rf"rank \d of 2 \(process {victim.pid}\) .*{told}"):
        handle.result(timeout=20)
    assert time.monotonic() - began < limit
    for ask in (two.check_health, lambda: two.generate_async(PROMPTS[0])):
        with pytest.raises(EngineDeadError, match=told):
            ask()
    _, alive = psutil.wait_procs([victim, other], timeout=10)
    assert alive == []
    two.restart()
    two.check_health()
    assert two.generate(PROMPTS[1], SamplingParams(max_tokens=8)).text == expected


def test_data_parallel_ranks_share_the_requests(one, tiny_with_tokenizer):
    params = [SamplingParams(max_tokens=n) for n in (6, 12, 20, 9, 15)]
    expected = [output.text for output in one.generate(PROMPTS, params)]
    with LLM(tiny_with_tokenizer, tensor_parallel_size=2, enable_attention_dp=True, **SETTINGS) as llm:
        assert [output.text for output in llm.generate(PROMPTS, params)] == expected
        assert [scheduler.prompt_tokens > 0 for scheduler in llm._engine.engine.schedulers] == [True, True]
        before = llm._engine.engine.schedulers[1].prompt_tokens
        llm.generate(PROMPTS[0], params[0], scheduling_params=SchedulingParams(attention_dp_rank=1))
        assert llm._engine.engine.schedulers[1].prompt_tokens > before
        with pytest.raises(ValueError, match="attention_dp_rank=2"):
            llm.generate(PROMPTS[0], scheduling_params=SchedulingParams(attention_dp_rank=2))


def test_a_checkpoint_that_no_rank_can_load_is_told_as_by_one(tmp_path, tiny_with_tokenizer):
    for file in tiny_with_tokenizer.iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    before = workers()
    with pytest.raises(CheckpointError) as alone:
        LLM(tmp_path)
    with pytest.raises(CheckpointError) as together:
        LLM(tmp_path, tensor_parallel_size=2)
    assert str(together.value) == str(alone.value)
    assert workers() == before


# It does not close its LLM.
SCRIPT = """
import sys
from deepseek_fp4_plugin import LLM, SamplingParams
llm = LLM(sys.argv[1], tensor_parallel_size=2, max_batch_size=2)
print(llm.generate("abc", SamplingParams(max_tokens=4)).outputs[0].length, flush=True)
llm.generate("abc", SamplingParams(max_tokens=100000, ignore_eos=True))
"""


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.proof
def test_no_worker_outlives_its_front(tmp_path, tiny_with_tokenizer, blow):
    (tmp_path / "plain.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "plain.py", str(tiny_with_tokenizer)], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "4\n"
    found = workers(process.pid)
    assert len(found) == 2
    os.kill(process.pid, blow)
    process.communicate(timeout=20)
    _, alive = psutil.wait_procs(found, timeout=10)
    assert alive == []


@pytest.mark.proof
def test_torchrun_starts_the_ranks(tmp_path, tiny_with_tokenizer):
    """Its first process goes on with the program, the other serves it and leaves."""
    (tmp_path / "plain.py").write_text(SCRIPT.replace("100000", "9"))
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "plain.py", str(tiny_with_tokenizer)]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert (done.stdout, done.returncode) == ("4\n", 0), done.stderr
    command[3] = "3"
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode != 0
    assert "tensor_parallel_size=2, but torchrun started 3 processes" in done.stderr
