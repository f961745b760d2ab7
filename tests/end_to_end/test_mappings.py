"""The whole engine over ranks in processes joined by gloo, greedy in FP32, token for token what one process gives.

Four processes start once and take every mapping in turn. Each rank runs the whole engine, and the ranks' results
are exchanged where each has a scheduler; so no rank learns from another what it would not be told by a plan.
"""

import functools
import itertools
import random
from collections import deque
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepseek_fp4_plugin.engine.engine import LLMEngine
from deepseek_fp4_plugin.engine.executor import InProcessExecutor
from deepseek_fp4_plugin.engine.recorded_steps import Sizes
from deepseek_fp4_plugin.kernels import cpu
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.parallel.collectives import ProcessGroup
from deepseek_fp4_plugin.parallel.mesh import Mesh
from tests.engine_core import make_engine, make_request
from tests.ranks import MAPPINGS, Processes

TIE = 1e-3  # a differing token is excused only where the two best logits are this close
LENGTH = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "MTP": {"drafts": 2},
    "chunked prefill": {"tokens": 11},
    "prefix reuse": {"reuse": True},
    "preemption": {"blocks": 12, "block_size": 4},
    "overlap": {"overlap": True},
}


def prompts(count: int = 8, seed: int = 0) -> dict[int, list[int]]:
    """Of 9 to 32 tokens, each with a piece of the same prefix."""
    rng = random.Random(seed)
    shared = [rng.randrange(320) for _ in range(20)]
    out = {}
    for i in range(count):
        own = [rng.randrange(320) for _ in range(rng.randint(1, 12))]
        out[i] = shared[: rng.randint(8, 20)] + own
    return out


@functools.lru_cache(maxsize=2)
def load(folder: str, mesh: Mesh) -> DeepseekV3ForCausalLM:
    return DeepseekV3ForCausalLM.from_pretrained(folder, dtype="float32", mesh=mesh)


class Lockstep:
    """The executor of a rank among ranks that all run the engine: this rank's plan, and everybody's results."""

    def __init__(self, mesh: Mesh, inner: InProcessExecutor):
        self.mesh, self.inner = mesh, inner
        self.facts, self.num_schedulers = inner.facts, mesh.dp.count
        self.empty_steps = 0
        self._submitted: deque[int] = deque()

    def submit(self, plans) -> None:
        plan = plans[self.mesh.dp.index]
        self.empty_steps += not plan.rows
        self.inner.submit([plan])

    def collect(self) -> list[Any]:
        (result,) = self.inner.collect()
        if self.num_schedulers == 1:
            return [result]
        results: list[Any] = [None] * self.num_schedulers
        assert isinstance(self.mesh.world, ProcessGroup)
        dist.all_gather_object(results, result, group=self.mesh.world.group)
        return results

    def watch(self, alarm) -> None:
        pass


def engine_of(mesh: Mesh, model: DeepseekV3ForCausalLM, options: dict[str, Any]) -> tuple[LLMEngine, Lockstep]:
    engines = [make_engine(model, **options) for _ in range(mesh.dp.count)]
    executor = Lockstep(mesh, engines[mesh.dp.index].executor)
    schedulers = [engine.schedulers[0] for engine in engines]
    return LLMEngine(schedulers, executor, model.config.vocab_size, overlap=options.get("overlap", False)), executor


def run(engine: LLMEngine, given: dict[int, list[int]], length: int = LENGTH) -> dict[int, list[int]]:
    outputs: dict[int, list[int]] = {}
    for i, prompt in given.items():
        engine.add(make_request(i, prompt, length))
        outputs[i] = []
    while engine.has_work:
        for emission in engine.step():
            outputs[emission.request.request_id] += emission.tokens
    return outputs


def serve(
    mesh: Mesh, folder: str, options: dict[str, Any], truth: dict[int, list[int]] | None, count: int = 8
) -> dict[str, Any]:
    """The prompts through the engine; twice, where prefixes are kept. truth: what drafts are replaced by, in part."""
    model, given = load(folder, mesh), prompts(count)
    options = {"reuse": False, **options}
    if truth and options.get("drafts"):
        options["oracle"] = {i: given[i] + truth[i] for i in given}
    engine, executor = engine_of(mesh, model, options)
    outputs = run(engine, given)
    if options["reuse"]:
        outputs |= {i + 100: tokens for i, tokens in run(engine, given).items()}
    for scheduler in engine.schedulers:
        scheduler.blocks.check([])  # every block has returned, on every rank
    stats = engine.stats()
    return {
        "outputs": outputs,
        "preemptions": stats.preemptions,
        "cached": stats.cached_prompt_tokens,
        "accepted": sum(stats.answer.accepted),
        "idle": executor.empty_steps,
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    processes = Processes(4, tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def expected(tiny_fp8) -> dict[int, list[int]]:
    return serve(Mesh(), str(tiny_fp8), {}, None)["outputs"]


@torch.inference_mode()
def excused(folder, expected: dict[int, list[int]], outputs: dict[int, list[int]]) -> int:
    """How many outputs part at a near tie; any other difference fails."""
    count = 0
    for request, found in outputs.items():
        wanted, prompt = expected[request % 100], prompts()[request % 100]
        assert len(found) == LENGTH
        if found == wanted:
            continue
        at = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
        model = load(str(folder), Mesh())
        best = model.compute_logits(model(ForwardBatch.from_sequences([prompt + wanted[:at]]))[-1:]).topk(2).values[0]
        assert best[0] - best[1] < TIE, f"request {request}, token {at}: {found[at]} for {wanted[at]}"
        count += 1
    return count


def check(ranks, folder, expected, mapping: str, options: dict[str, Any]) -> tuple[int, int]:
    """Excused and all tokens."""
    answers = ranks.run(mapping, serve, str(folder), options, expected)
    for answer in answers[1:]:  # every rank has seen the same
        assert answer["outputs"] == answers[0]["outputs"]
    seen = answers[0]
    if "drafts" in options:
        assert seen["accepted"] > 0
    if "blocks" in options:
        assert seen["preemptions"] > 0
    if options.get("reuse"):
        assert seen["cached"] > 0
    outputs = seen["outputs"]
    return excused(folder, expected, outputs), len(outputs) * LENGTH


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_every_option_alone_gives_what_one_process_gives(ranks, tiny_fp8, expected, mapping):
    found = [check(ranks, tiny_fp8, expected, mapping, options) for options in OPTIONS.values()]
    assert sum(n for n, _ in found) <= sum(tokens for _, tokens in found) / 1000


def test_ranks_without_requests_step_along(ranks, tiny_fp8, expected):
    """One request, and three ranks that compute its experts and drafts with it."""
    answers = ranks.run("DP4/EP2", serve, str(tiny_fp8), {"drafts": 2, "tokens": 11}, expected, 1)
    assert excused(tiny_fp8, expected, answers[0]["outputs"]) == 0
    assert sorted(answer["idle"] > 0 for answer in answers) == [False, True, True, True]


def serve_recorded(mesh: Mesh, folder: str, sizes: Sizes, drafts: int) -> dict[str, Any]:
    """BF16, two requests at a time: the outputs, and how many steps were replayed."""
    model = DeepseekV3ForCausalLM.from_pretrained(folder, mesh=mesh)
    options = {"drafts": drafts, "batch": 2, "sizes": sizes, "cache_dtype": torch.bfloat16, "reuse": False}
    engine, executor = engine_of(mesh, model, options)
    outputs = run(engine, prompts(8), 20)
    recorded = executor.inner.runner.recorded
    return {"outputs": outputs, "replays": recorded.num_replays, "sizes": [key[0] for key in recorded.recordings]}


@pytest.mark.skipif(not cpu.available(), reason="the CPU extension is not built")
@pytest.mark.parametrize("mapping", ["TP2", "TP4/EP2", "DP2/EP2"])
@pytest.mark.parametrize("drafts", [0, 2])
def test_recorded_steps_compute_the_same_over_ranks(ranks, tiny_nvfp4, mapping, drafts):
    """BF16, bit for bit, exact sizes and padded ones; every rank records and replays the same."""
    never = ranks.run(mapping, serve_recorded, str(tiny_nvfp4), Sizes(()), drafts)
    assert never[0]["replays"] == 0
    for sizes in (Sizes((1, 2)), Sizes((2,), padded=True)):
        found = ranks.run(mapping, serve_recorded, str(tiny_nvfp4), sizes, drafts)
        for answer in found:
            assert answer == found[0] and answer["outputs"] == never[0]["outputs"]
        assert found[0]["replays"] > 10 and found[0]["sizes"]


@pytest.mark.proof
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_pairs_of_options(ranks, tiny_fp8, expected, mapping):
    pairs = list(itertools.combinations([name for name in OPTIONS if name != "plain"], 2))
    found = []
    for one, other in random.Random(mapping).sample(pairs, 5):
        found.append(check(ranks, tiny_fp8, expected, mapping, {**OPTIONS[one], **OPTIONS[other]}))
    assert sum(n for n, _ in found) <= sum(tokens for _, tokens in found) / 1000
