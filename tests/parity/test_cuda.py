"""On a GPU: the same model and engine give what they give on the CPU."""

import random
import time

import pytest
import torch

from deepseek_fp4_plugin import LLM, SamplingParams
from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.engine.recorded_steps import Sizes
from deepseek_fp4_plugin.engine.step_plan import Sampling
from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.kernels.cuda import compiler, launcher
from deepseek_fp4_plugin.kernels.cuda_graph import GraphRecorder
from deepseek_fp4_plugin.kernels.weights import WeightTensors
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.numerics import fp8_block, nvfp4
from tests.engine_core import make_engine, make_request, run_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_quantization_gives_the_same_bits():
    torch.manual_seed(0)
    weight = torch.randn(256, 512, dtype=torch.bfloat16) * torch.logspace(-8, 8, 256).unsqueeze(1).bfloat16()
    here, there = nvfp4.quantize(weight), nvfp4.quantize(weight.cuda())
    assert torch.equal(here.packed, there.packed.cpu())
    assert torch.equal(here.scale.view(torch.uint8), there.scale.view(torch.uint8).cpu())
    assert torch.equal(here.scale_2, there.scale_2.cpu())


@pytest.mark.parametrize("backend", ["reference", "decoded"])
def test_logits(tiny_fp8, backend):
    torch.backends.cuda.matmul.allow_tf32 = False
    batch = [torch.randint(0, 320, (n,)).tolist() for n in (5, 100, 33)]
    logits = {}
    for device in ("cpu", "cuda"):
        model = DeepseekV3ForCausalLM.from_pretrained(tiny_fp8, dtype="float32", device=device, backend=backend)
        with torch.inference_mode():
            logits[device] = model.compute_logits(model(ForwardBatch.from_sequences(batch, device))).cpu()
    assert (logits["cpu"] - logits["cuda"]).abs().max() < 1e-3


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_engine(drafts, cache):
    """r1_nano's greedy answers on the GPU, in BF16: sharp enough that rounding does not change the text."""
    speculative = {"num_nextn_predict_layers": drafts} if drafts else None
    texts = {}
    for device in ("cpu", "cuda"):
        with LLM("r1_nano", device=device, speculative_config=speculative, kv_cache_config={"dtype": cache}) as llm:
            questions = ["What is 123 + 456?", "Sort 5, 3, 9.", "Write 1252470 backwards."]
            ids = [llm.tokenizer.encode_chat([{"role": "user", "content": q}]) for q in questions]
            texts[device] = [o.text for o in llm.generate(ids, SamplingParams(max_tokens=200))]
    same = sum(a == b for a, b in zip(texts["cpu"], texts["cuda"], strict=True))
    assert same >= 2
    assert r"\boxed{579}" in texts["cuda"][0]


class Plain:
    """Records nothing: a "replay" runs the same step again, kernel by kernel."""

    def record(self, function):
        return function, function()


@pytest.fixture(scope="module")
def on_gpu():
    return DeepseekV3ForCausalLM.from_pretrained("r1_nano", device="cuda")


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("overlap", [False, True])
def test_whole_steps_are_captured_and_replayed(on_gpu, drafts, overlap):
    """Forward, sampling, verification and drafts as one CUDA graph, in two sizes: the tokens of the same kernels
    launched one by one, and (rounding depends on the shape) nearly always those of steps that are not filled up."""
    outputs = {}
    for how in ("graph", "plain", "exact shapes"):
        sizes = Sizes(()) if how == "exact shapes" else Sizes((2, 4), padded=True)
        engine = make_engine(
            on_gpu,
            drafts=drafts,
            batch=4,
            blocks=256,
            block_size=32,
            cache_dtype=torch.bfloat16,
            sizes=sizes,
            overlap=overlap,
            think_ids=(3, 4),
        )
        recorded = engine.executor.runner.recorded
        if how == "plain":
            recorded.recorder = Plain()
        rng, requests = random.Random(0), []
        for i in range(9):
            own = {"sampling": Sampling(greedy=False, seed=i, top_p=0.9)} if i % 3 == 1 else {}
            own |= {"relaxed_topk": 4, "relaxed_delta": 0.5} if i % 3 == 2 else {}
            prompt = [rng.randrange(5, 900) for _ in range(rng.randint(1, 60))]
            requests.append(make_request(i, prompt, 20 + 5 * i, **own))
        outputs[how] = run_all(engine, requests)
        if how != "exact shapes":
            assert {key[0] for key in recorded.recordings} == {2, 4} and recorded.num_replays > 20
    assert outputs["graph"] == outputs["plain"]
    same = sum(
        a == b for i in outputs["graph"] for a, b in zip(outputs["graph"][i], outputs["exact shapes"][i], strict=True)
    )
    assert same >= 0.5 * sum(map(len, outputs["graph"].values()))


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_warm_engine_lacks_nothing_and_answers_as_a_cold_one(drafts, monkeypatch):
    """No kernel is compiled and no step recorded for the first requests; tokens and every block are the same.

    How requests share steps must not hang on the clock: prompts keep no pace, and an answer's last step has ended
    before the next prompt comes.
    """
    launcher.kernel.cache_clear()
    loaded, cubin = [], compiler.cubin

    def watched(file, defines, architecture):
        loaded.append((file, defines))
        return cubin(file, defines, architecture)

    monkeypatch.setattr(compiler, "cubin", watched)
    settings = {
        "max_batch_size": 6,
        "max_seq_len": 1024,
        "max_num_tokens": 1024,
        "max_prompt_seconds": None,
        "kv_cache_config": {"max_tokens": 8192},
    }
    if drafts:
        settings["speculative_config"] = {"num_nextn_predict_layers": drafts}
    answers, blocks = [], []
    for warm_up in (True, False):
        with LLM("r1_nano", device="cuda", warm_up=warm_up, **settings) as llm:
            runner = llm._executor.runner
            recordings, made = len(runner.recorded.recordings), len(loaded)
            assert (llm.warm_up is not None) == warm_up == bool(recordings)
            runner.cache.view(torch.uint8).zero_()
            own = []
            for n, temperature in ((1, 0.0), (1, 0.8), (3, 0.5), (5, 0.8), (6, 0.8)):
                params = SamplingParams(max_tokens=40, n=n, temperature=temperature, seed=n, ignore_eos=True)
                for prompt in (f"{n}: Sort 5, 3, 9.", f"{n}: " + "What is 123 + 456? " * 12):
                    own += [o.token_ids for o in llm.generate(prompt, params).outputs]
                    while llm._engine.engine.has_work:
                        time.sleep(0.001)
            if warm_up:
                assert made and loaded[made:] == [] and len(runner.recorded.recordings) == recordings
                assert llm.warm_up.bytes > 0 and llm.memory_use()["steps"] == llm.warm_up.bytes
            answers.append(own)
            blocks.append(runner.cache[:, :-1].view(torch.uint8).cpu())
    assert answers[0] == answers[1]
    assert torch.equal(*blocks)


def test_graphs_take_turns_at_the_same_memory():
    """Results included: smaller steps recorded behind the largest take nothing more."""
    recorder, x = GraphRecorder(torch.device("cuda")), torch.randn(16 << 20, device="cuda")
    sizes = (16 << 20, 12 << 20, 8 << 20, 4 << 20)
    replays, reserved = [], []
    for size in sizes:
        replays.append(recorder.record(lambda size=size: (x[:size] * 2 + 1,))[0])
        reserved.append(torch.cuda.memory_reserved())
    assert reserved == reserved[:1] * len(sizes)
    for value in (1.0, 3.0):
        x.fill_(value)
        for size, replay in zip(sizes, replays, strict=True):
            (result,) = replay()
            assert result.shape == (size,) and bool((result == 2 * value + 1).all())


def stacked(weight_format: WeightFormat, experts: int, *shape: int) -> WeightTensors:
    weights = [torch.randn(*shape).to(torch.bfloat16) for _ in range(experts)]
    if weight_format is WeightFormat.PLAIN:
        return WeightTensors(weight_format, torch.stack(weights))
    if weight_format is WeightFormat.FP8_BLOCK:
        codes, scales = zip(*(fp8_block.quantize(weight.float()) for weight in weights), strict=True)
        return WeightTensors(weight_format, torch.stack(codes), torch.stack(scales))
    parts = [nvfp4.quantize(weight) for weight in weights]
    fields = zip(*((part.packed, part.scale, part.scale_2) for part in parts), strict=True)
    return WeightTensors(weight_format, *(torch.stack(tensors) for tensors in fields))


@pytest.mark.parametrize("weight_format", list(WeightFormat), ids=lambda f: f.name)
def test_experts_without_counting_tokens(weight_format):
    """decoded's batched products against the reference, for few tokens and for many."""
    torch.backends.cuda.matmul.allow_tf32 = False
    experts, hidden, inner = 6, 128, 128
    parts = [stacked(weight_format, experts, *shape) for shape in ((2 * inner, hidden), (hidden, inner))]
    for tokens in (1, 7, 64, 65):
        x = torch.randn(tokens, hidden, device="cuda")
        ids = torch.stack([torch.randperm(experts)[:2] for _ in range(tokens)]).cuda()
        ids[0, 0] = -1
        weights = torch.rand(tokens, 2, device="cuda")
        results = []
        for backend in ("decoded", "reference"):
            gate_up, down = (ops.prepare([p], torch.device("cuda"), torch.float32, backend=backend) for p in parts)
            results.append(ops.experts_mlp(x, ids, weights, gate_up, down))
        assert (results[0] - results[1]).abs().max() <= 1e-5 * results[1].abs().max()


def test_a_capture_survives_the_end_of_another_graph():
    """Old graphs in a cycle are the collector's, which runs whenever enough objects have been made."""
    x, weight = torch.randn(4, 64, device="cuda").bfloat16(), torch.ones(64, device="cuda").bfloat16()

    def function():
        cycles: list = []
        for _ in range(100_000 * torch.cuda.is_current_stream_capturing()):
            cycles.append(cycles)
            cycles = [cycles]
        return (ops.rms_norm(x, weight, 1e-6),)

    for _ in range(3):
        replay, results = GraphRecorder(x.device).record(function)
        replay()
        assert torch.equal(results[0], ops.rms_norm(x, weight, 1e-6))
        old: list = [replay]
        old.append(old)
        del old, replay, results
