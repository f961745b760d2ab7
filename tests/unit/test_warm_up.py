"""A warm-up runs the steps that will come, and leaves nothing behind but what makes them quick."""

import itertools
import random

import pytest
import torch

from deepseek_fp4_plugin import LLM, SamplingParams
from deepseek_fp4_plugin.cli.app import run
from deepseek_fp4_plugin.cli.generate import load
from deepseek_fp4_plugin.config import EngineConfig, SpeculativeConfig
from deepseek_fp4_plugin.engine.engine import LLMEngine
from deepseek_fp4_plugin.engine.recorded_steps import Kind, Sizes
from deepseek_fp4_plugin.engine.step_plan import Sampling
from deepseek_fp4_plugin.engine.warm_up import _PROMPTS, kinds_of, prompts_of, sizes_of, warm_up
from deepseek_fp4_plugin.engine.worker import WarmUp
from deepseek_fp4_plugin.kernels import cpu
from deepseek_fp4_plugin.kernels.cuda import experts_wgmma
from deepseek_fp4_plugin.kernels.cuda.experts import expected_rows
from deepseek_fp4_plugin.kernels.cuda.moe import LISTED_ROWS_HOPPER
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from tests.engine_core import make_engine, make_request, run_all

PADDED = Sizes((1, 2, 4), padded=True)
RELAXED = SpeculativeConfig(
    num_nextn_predict_layers=2, use_relaxed_acceptance_for_thinking=True, relaxed_topk=4, relaxed_delta=0.5
)
needs_recorder = pytest.mark.skipif(not cpu.available(), reason="the CPU extension is not built")


def engine_of(model, drafts: int) -> LLMEngine:
    """Every cache slot is NaN, so that one written shows, and so does one read."""
    engine = make_engine(model, drafts=drafts, batch=4, blocks=64, cache_dtype=torch.bfloat16, sizes=PADDED)
    engine.executor.runner.expert_load = model.count_expert_load()
    return engine


def warmed(engine: LLMEngine, speculative: SpeculativeConfig | None = RELAXED, progress=None) -> None:
    runner, kinds = engine.executor.runner, kinds_of(speculative)
    warm_up(runner, sizes_of(runner, 128), kinds, prompts_of(runner, 128), progress)


def bits(engine: LLMEngine) -> list[torch.Tensor]:
    """All that a rank keeps: the cache but the dummy's block, which nobody reads before it is written; its slots."""
    runner = engine.executor.runner
    kept = [value for value in vars(runner.slots).values() if isinstance(value, torch.Tensor)]
    return [runner.cache[:, :-1].view(torch.int16).clone(), *(value.clone() for value in kept)]


def answers(engine: LLMEngine) -> dict[int, list[int]]:
    """Of greedy, drawn and relaxed requests, with prompts that share blocks."""
    rng, requests = random.Random(1), []
    for i in range(10):
        own = [{}, {"sampling": Sampling(greedy=False, seed=i)}, {"relaxed_topk": 4, "relaxed_delta": 0.5}][i % 3]
        prompt = [7] * 20 + [rng.randrange(5, 300) for _ in range(rng.randint(1, 40))]
        requests.append(make_request(i, prompt, 24, **own))
    return run_all(engine, requests)


@needs_recorder
@pytest.mark.parametrize("drafts", [0, 2])
def test_nothing_is_left_but_recordings(tiny_fp8, drafts):
    model = DeepseekV3ForCausalLM.from_pretrained(tiny_fp8)
    cold, warm = engine_of(model, drafts), engine_of(model, drafts)
    runner, random_state, torch_state = warm.executor.runner, random.getstate(), torch.get_rng_state()
    before, kept, free = bits(warm), runner.slots.num_blocks[:], list(warm.schedulers[0].blocks._free)
    setups = runner.slots.setups[:]
    warmed(warm)
    assert all(torch.equal(a, b) for a, b in zip(bits(warm), before, strict=True))
    assert (runner.slots.num_blocks, runner.slots.setups) == (kept, setups)
    assert list(warm.schedulers[0].blocks._free) == free
    assert not any(counts.any() for counts in runner.expert_load.values())
    assert random.getstate() == random_state and torch.equal(torch.get_rng_state(), torch_state)

    recorded = {key[:3] for key in runner.recorded.recordings}
    assert recorded == {(size, kind, 0) for size in (1, 2, 4) for kind in (Kind(True, 4), Kind(False, 4))}
    assert answers(warm) == answers(cold)  # what an engine computes that was not warmed up
    assert all(torch.equal(a, b) for a, b in zip(bits(warm), bits(cold), strict=True))
    assert runner.recorded.num_replays > 10


@needs_recorder
def test_requests_without_wishes_of_their_own_find_every_step_recorded(tiny_fp8):
    model = DeepseekV3ForCausalLM.from_pretrained(tiny_fp8)
    engine = engine_of(model, 2)
    warmed(engine, None)
    recordings = engine.executor.runner.recorded.recordings
    before = set(recordings)
    run_all(engine, [make_request(i, [5 + i, 9], 12, Sampling(greedy=bool(i % 2), seed=i)) for i in range(7)])
    assert set(recordings) == before and engine.executor.runner.recorded.num_replays > 0


def test_where_nothing_is_recorded_the_steps_are_computed(tiny_fp8, monkeypatch):
    model = DeepseekV3ForCausalLM.from_pretrained(tiny_fp8, dtype="float32")
    engine = make_engine(model, drafts=1, batch=5)
    computed, inner = [], type(model).forward

    def watched(self, batch, cache):
        computed.append(batch)
        return inner(self, batch, cache)

    monkeypatch.setattr(type(model), "forward", watched)
    runner = engine.executor.runner
    runner.recorded.recorder, runner.recorded.sizes = None, Sizes(())
    warmed(engine, None)
    assert [batch.num_decode_requests for batch in computed if not batch.chunks][:6] == [4, 4, 2, 2, 1, 1]
    assert [chunk.stop for batch in computed for chunk in batch.chunks] == [128, 64, 32, 16, 64]  # the last behind 64
    assert [int(batch.positions[0]) for batch in computed][-4:] == [0, 64, 64, 64]


def test_what_is_run(tiny_fp8):
    model = DeepseekV3ForCausalLM.from_pretrained(tiny_fp8)
    runner = make_engine(model, drafts=2, batch=64, blocks=16, sizes=Sizes((1, 4, 8, 64))).executor.runner
    assert sizes_of(runner, 512) == (64, 8, 4, 1) and sizes_of(runner, 24) == (8, 4, 1)  # tokens of a step
    assert prompts_of(runner, 100) == (100, 64, 32, 16, 8)
    assert prompts_of(runner, 512) == (512, 256, 128, 64, 32, 16, 8)
    assert prompts_of(make_engine(model, drafts=2, batch=3, blocks=16).executor.runner, 512)[0] == 3 * (16 * 8 - 5)
    assert kinds_of(None) == (Kind(True), Kind(False))
    assert kinds_of(RELAXED) == (Kind(True, 4), Kind(False, 4))


def test_progress_is_told_and_an_interruption_goes_through(tiny_fp8):
    model = DeepseekV3ForCausalLM.from_pretrained(tiny_fp8)
    seen: list[tuple[int, int]] = []
    warmed(engine_of(model, 0), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 14) for done in range(15)]

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        warmed(engine_of(model, 0), progress=interrupt)


def test_too_little_memory_is_one_sentence(tiny_fp8, monkeypatch):
    engine = engine_of(DeepseekV3ForCausalLM.from_pretrained(tiny_fp8), 0)

    def full(size: int, kind: Kind) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(engine.executor.runner, "prepare", full)
    with pytest.raises(ValueError, match=r"^a step of 4 requests does not fit .* lower max_batch_size"):
        warmed(engine)


# ------------------------------------------------------------------ the whole way


SETTINGS = {"max_batch_size": 4, "max_num_tokens": 64, "max_seq_len": 200, "moe_config": {"count_load": True}}
DRAFTS = {"speculative_config": {"num_nextn_predict_layers": 2}}


def served(folder, **settings) -> tuple[list, WarmUp | None]:
    """Answers to two prompts, drawn with seeds of the engine's own, and what the warm-up was."""
    stages: list[str] = []
    with LLM(
        folder, device="cpu", progress=lambda what, done, total: stages.append(what), **SETTINGS, **settings
    ) as llm:
        stats = llm.get_stats()
        assert (stats.steps, stats.computed_tokens, stats.cache_blocks_used, llm.get_iteration_stats()) == (0, 0, 0, [])
        assert not any(map(any, stats.expert_load.values()))
        # The answers to a prompt are begun together, so that steps have the same rows in both engines.
        params = SamplingParams(max_tokens=16, temperature=1.0, n=3)
        outputs = [llm.generate(prompt, params) for prompt in ("Hello", "A long one, " * 9)]
        assert ("warming up" in stages) == (llm.warm_up is not None) == bool(settings.get("warm_up"))
        if llm.warm_up:  # else recording a step counts its dummies' tokens
            stats, each = llm.get_stats(), llm.model_config.num_experts_per_tok
            assert sum(stats.expert_load[1]) == stats.computed_tokens * each
        told = [(o.request_id, [c.token_ids for c in o.outputs], o.metrics.cached_tokens) for o in outputs]
        return told, llm.warm_up


@pytest.mark.parametrize(
    "ranks",
    [{}, DRAFTS, DRAFTS | {"tensor_parallel_size": 2, "enable_attention_dp": True}],
    ids=["one", "drafts", "attention DP"],
)
def test_a_warm_engine_answers_as_a_cold_one(tiny_with_tokenizer, ranks):
    """With attention data parallelism every rank has warmed up with the others, and one of them has no request."""
    expected, cold = served(tiny_with_tokenizer, **ranks)
    found, warm = served(tiny_with_tokenizer, warm_up=True, **ranks)
    assert found == expected
    assert cold is None and warm.seconds > 0 and bool(warm.recordings) == cpu.available()


def test_the_flag(tiny_with_tokenizer, capsys):
    """Of `generate`, which without it has no warm-up on a GPU either."""
    for given, expected in ((None, False), (True, True)):
        with load(EngineConfig(model=str(tiny_with_tokenizer), device="cpu", max_batch_size=1, warm_up=given)) as llm:
            assert llm.config.warm_up is expected
    told = []
    for flag in ("--warm_up", "--no_warm_up"):
        arguments = ["generate", str(tiny_with_tokenizer), "x", "--max-tokens", "2", "--max-batch-size", "1", flag]
        assert run([*arguments, "--device", "cpu"]) == 0
        told.append("warming up" in capsys.readouterr().err)
    assert told == [True, False]


def test_prompts_come_to_every_kernel_of_experts():
    """Of a model with 32 times as many experts as a token takes; more than 4,096 tokens are the largest step's."""
    ends = [LISTED_ROWS_HOPPER, *(most for most in experts_wgmma.MEASURED if most <= 128)]
    rows = [expected_rows(count, 8, 256) for count in _PROMPTS]
    for low, high in itertools.pairwise([*ends, expected_rows(4096, 8, 256)]):
        assert any(low < each <= high for each in rows), (low, high)
