"""One rank's share of the whole DeepSeek-R1 on one GPU, step by step, beside what it must read and compute.

    python benchmarks/shard.py [--layout tp8 tp8ep2 ep8dp tp4ep2] [--checkpoint v1] [--batch 1 ...] [--context 1024 ...]
        [--drafts 0 3] [--only decode prefill] [--prompt 8192 ...] [--prompts 1 ...] [--layers 61] [--steps 9]
        [--activations bf16] [--json FILE] [--dry]

The model, the runner, its recorded steps and their CUDA graph are the engine's own; weights are random, of the exact
shapes of 61 layers and the MTP module, in the formats of the published checkpoint. Communication is left out: what
other ranks would send is random and there already (under attention data parallelism their tokens too, as many as this
rank's).

decode   a recorded step of `batch` requests whose newest token sees `context` tokens: from the host's word to the
         sampled tokens, drafts included. With drafts a step is 1 + drafts tokens a request; drafts are random.
prefill  whole prompts of --prompt tokens, --prompts of them in one step, on the host's clock.

Every step begins with other random tokens, so that experts are chosen anew; `hit` is the share of a layer's experts
that were, beside the share that models/ledger.py expects. The roofline is its bytes at this card's read rate and its
operations at torch's BF16 rate, line by line. Medians of --steps. What does not fit is listed. One layout takes two
minutes. --dry runs every cell's step on shapes alone, and needs no GPU. Ranks that do exchange: shard_ranks.py.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from cuda_kernels import Bench
from random_rank import BF16, Absent, RandomRank

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.engine import kv_cache
from deepseek_fp4_plugin.engine.model_runner import ModelRunner
from deepseek_fp4_plugin.engine.recorded_steps import Sizes
from deepseek_fp4_plugin.engine.step_plan import PlanRow, Sampling, Setup, StepPlan
from deepseek_fp4_plugin.kernels.weights import Activations
from deepseek_fp4_plugin.layers.moe import MoE
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.deepseek_r1 import DEEPSEEK_R1
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.models.inventory import Role, Weight
from deepseek_fp4_plugin.models.ledger import CACHE, FormatOf, Line, Step, decode_step, expected_share, seconds
from deepseek_fp4_plugin.parallel.collectives import Group
from deepseek_fp4_plugin.parallel.mesh import Mesh
from deepseek_fp4_plugin.quantization.plan import becomes_nvfp4

BLOCK = 64
LAYOUTS: dict[str, dict] = {
    "tp8": {},
    "tp8ep2": {"moe_expert_parallel_size": 2},
    "ep8dp": {"moe_expert_parallel_size": 8, "enable_attention_dp": True},
    "tp4ep2": {"moe_expert_parallel_size": 2},
}
RANKS = {"tp8": 8, "tp8ep2": 8, "ep8dp": 8, "tp4ep2": 4}
BATCHES, CONTEXTS, DRAFTS = (1, 2, 4, 8, 16, 32, 64, 128), (1024, 4096, 16384, 65536), (0, 3)
RESERVE = 9 << 30  # bytes left for activations and graphs


@dataclass(frozen=True)
class Cell:
    """batch requests of this rank, each with `context` tokens behind the step; drafts a step."""

    what: str
    batch: int
    context: int
    drafts: int

    @property
    def width(self) -> int:
        """Tokens of a request in this step."""
        return self.context if self.what == "prefill" else 1 + self.drafts

    @property
    def blocks_each(self) -> int:
        return -(-(self.context + 2 * (1 + self.drafts)) // BLOCK)


@dataclass
class Row:
    layout: str
    what: str
    batch: int
    context: int
    drafts: int
    milliseconds: float
    roof_milliseconds: float
    hit: float
    hit_expected: float
    activations: str


class Rank:
    """One rank's model and cache on a device, and its steps."""

    def __init__(
        self,
        config: DeepseekV3Config,
        cuts: dict,
        checkpoint: str,
        group: Group,
        device: torch.device,
        activations: Activations = "bf16",
    ):
        self.config, self.device = config, device
        self.mesh = Mesh(group.rank, group.size, group=group, **cuts)
        self.model = DeepseekV3ForCausalLM(config, self.mesh)
        source = RandomRank(config, checkpoint, device, self.mesh, activations)
        for part in self.model.parts():
            part.load(source)
        self.names = source.asked

    def allocate(self, wanted: int) -> None:
        """A cache of so many blocks, or of as many as there is room for, full of random entries."""
        layers = self.config.num_hidden_layers + 1
        block_bytes = BLOCK * kv_cache.bytes_per_token(self.config, layers, BF16)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            wanted = min(wanted, max(0, torch.cuda.mem_get_info()[0] - RESERVE) // block_bytes)
        self.cache = kv_cache.allocate(self.config, layers, max(2, wanted), BLOCK, BF16, self.device)
        for layer in self.cache:
            layer.normal_()

    def fits(self, cell: Cell) -> bool:
        return cell.batch * cell.blocks_each < self.cache.shape[1]

    def runner(self, cell: Cell, recorded: bool) -> ModelRunner:
        sizes = Sizes((cell.batch,) if recorded else ())
        blocks = cell.batch * cell.blocks_each + 1
        return ModelRunner(
            self.model, self.cache[:, :blocks], cell.drafts, cell.batch, cell.blocks_each, sizes, reads=False
        )

    def plan(self, cell: Cell, first: bool = True) -> StepPlan:
        """The cell's step; the first one also lets its requests in."""
        blocks = torch.randperm(cell.batch * cell.blocks_each).view(cell.batch, -1).tolist()
        start, prefill = cell.context - cell.width, cell.what == "prefill"
        setup = Setup(start, Sampling()) if first else None
        drafts = 0 if prefill else cell.drafts
        tokens = torch.randint(self._vocab, (cell.batch, cell.context if prefill else 0)).tolist()
        rows = [
            PlanRow(slot, tokens[slot], start, drafts, True, new_blocks=tuple(own) * first, setup=setup)
            for slot, own in enumerate(blocks)
        ]
        total, uniform = cell.batch * cell.width, not prefill
        if self.mesh.dp.count == 1:
            return StepPlan(rows, total, uniform)
        all_ranks = (total,) * self.mesh.dp.count, (cell.batch,) * self.mesh.dp.count
        return StepPlan(rows, total, uniform, *all_ranks, dp_uniform=uniform)

    def start(self, runner: ModelRunner, cell: Cell) -> None:
        """Other random tokens, at the same place."""
        runner.slots.tokens[: cell.batch].random_(self._vocab)
        runner.slots.starts[: cell.batch] = cell.context - cell.width

    @property
    def _vocab(self) -> int:
        """Tokens that this rank's part of the embedding holds: others would be zero without the other ranks."""
        start, stop = self.mesh.tp.bounds(self.config.vocab_size, "the vocabulary")
        return stop if start == 0 else self.config.vocab_size

    def decode(self, cell: Cell, steps: int) -> float:
        """Milliseconds of a recorded step."""
        runner = self.runner(cell, recorded=True)
        _finite(runner.run(self.plan(cell)).failures)
        plan, events = self.plan(cell, first=False), []
        for _ in range(steps + 2):
            self.start(runner, cell)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            runner.submit(plan)
            end.record()
            events.append((begin, end))
        for _ in events:
            _finite(runner.collect().failures)
        assert runner.recorded.num_replays == steps + 3, "steps were not replayed"
        return statistics.median(begin.elapsed_time(end) for begin, end in events[2:])

    def prefill(self, cell: Cell, steps: int) -> float:
        """Milliseconds of a prompt, on the host's clock."""
        runner, times = self.runner(cell, recorded=False), []
        for _ in range(min(steps, 3) + 1):
            plan = self.plan(cell)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            _finite(runner.run(plan).failures)
            times.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(times[1:])

    def hit(self, cell: Cell) -> float:
        """The share of a layer's experts that a step's tokens choose, mean over the main model's layers."""
        parts = [part for part in self.model.model.modules() if isinstance(part, MoE)]
        runner = self.runner(cell, recorded=False)
        runner.run(self.plan(cell))
        self.start(runner, cell)
        for part in parts:
            part.load_count = torch.zeros(self.config.n_routed_experts, dtype=torch.int64, device=self.device)
        runner.run(self.plan(cell, cell.what == "prefill"))
        counts = torch.stack([part.load_count for part in parts if part.load_count is not None])
        for part in parts:
            part.load_count = None
        return float((counts > 0).float().mean())


def _finite(failures: dict[int, str]) -> None:
    if failures:
        raise RuntimeError(f"a step went wrong: {failures}")


class Roofline:
    """The least milliseconds of a cell, from the byte ledger."""

    def __init__(self, config: DeepseekV3Config, format_of: FormatOf, bandwidth: float, rate: float):
        self.config, self.format_of, self.bandwidth, self.rate = config, format_of, bandwidth, rate

    def __call__(self, cell: Cell, mesh: Mesh) -> float:
        total = seconds(self._lines(self.config, cell, mesh, cell.width), self.bandwidth, self.rate)
        if cell.drafts:
            total += self._drafting(cell, mesh, cell.width) + (cell.drafts - 1) * self._drafting(cell, mesh, 1)
        return 1e3 * total

    def _lines(self, config: DeepseekV3Config, cell: Cell, mesh: Mesh, tokens: int) -> list[Line]:
        """The main model's step of so many tokens a request; a prompt attends expanded, and one row is sampled."""
        everyone = cell.batch * tokens * mesh.dp.count if mesh.dp.count > 1 else None
        lines = decode_step(config, self.format_of, Step(cell.batch, tokens, cell.context, 2, everyone), mesh)
        if cell.what == "decode":
            return lines
        rest = [line for line in lines if line.role not in (CACHE, Role.HEAD)]
        return [*rest, self._head(cell, mesh), _expanded(config, cell, mesh)]

    def _head(self, cell: Cell, mesh: Mesh) -> Line:
        """Of one row a request."""
        lines = decode_step(self.config, self.format_of, Step(cell.batch, 1, cell.context), mesh)
        return next(line for line in lines if line.role is Role.HEAD)

    def _drafting(self, cell: Cell, mesh: Mesh, tokens: int) -> float:
        """Seconds of the MTP module: a layer more than the model has, its projection, and the head for a row each."""
        cell = cell if tokens > 1 else replace(cell, what="decode")
        more, hidden = (
            replace(self.config, num_hidden_layers=self.config.num_hidden_layers + 1),
            self.config.hidden_size,
        )
        before = {line.role: line for line in self._lines(self.config, cell, mesh, tokens)}
        lines = [
            Line(line.role, line.bytes - before[line.role].bytes, line.flops - before[line.role].flops)
            for line in self._lines(more, cell, mesh, tokens)
        ]
        projection = Line(Role.MTP_PROJECTION, 4.0 * hidden**2, 4.0 * hidden**2 * cell.batch * tokens)
        return seconds([*lines, projection, self._head(cell, mesh)], self.bandwidth, self.rate)


def _expanded(config: DeepseekV3Config, cell: Cell, mesh: Mesh) -> Line:
    """Causal attention of prompts in expanded form; their latents are written and read once."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads / mesh.tp.count
    products = heads * cell.context**2 / 2 * (config.qk_head_dim + config.v_head_dim)
    entries = 2 * BF16.itemsize * cell.context * config.latent_dim
    return Line(CACHE, float(cell.batch * layers * entries), 2.0 * cell.batch * layers * products)


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    for what in options.only:
        for drafts in options.drafts:
            sizes = options.context, options.batch
            if what == "prefill":
                sizes = options.prompt, options.prompts
            yield from (Cell(what, batch, context, drafts) for context in sizes[0] for batch in sizes[1])


def published(config: DeepseekV3Config, checkpoint: str) -> FormatOf:
    def format_of(weight: Weight) -> WeightFormat:
        return WeightFormat.NVFP4 if becomes_nvfp4(weight, config, checkpoint) else WeightFormat.PLAIN

    return format_of


def measure(options: argparse.Namespace, config: DeepseekV3Config) -> list[Row]:
    """Every cell of every layout on this GPU."""
    bench, device, rows = Bench(), torch.device("cuda"), []
    roofline = Roofline(config, published(config, options.checkpoint), bench.bandwidth, bench.rate)
    print("communication between ranks is left out")
    for layout in options.layout:
        began, wanted = time.perf_counter(), list(cells(options))
        rank = None  # gives the layout before back
        torch.cuda.empty_cache()
        try:
            group = Absent(0, RANKS[layout])
            rank = Rank(config, LAYOUTS[layout], options.checkpoint, group, device, options.activations)
        except torch.cuda.OutOfMemoryError:
            print(f"{layout}: the weights do not fit this GPU")
            continue
        rank.allocate(max(cell.batch * cell.blocks_each for cell in wanted) + 1)
        held, room = torch.cuda.memory_allocated() - rank.cache.nbytes, rank.cache.shape[1] * BLOCK
        print(f"{layout}: {held / 1e9:.1f} GB of weights, room for {room} tokens, {time.perf_counter() - began:.0f} s")
        for cell in wanted:
            if not rank.fits(cell):
                print(f"{layout:<8}{cell.what:<8}batch {cell.batch:<4} context {cell.context:<6} does not fit")
                continue
            try:
                took = (rank.decode if cell.what == "decode" else rank.prefill)(cell, options.steps)
            except torch.cuda.OutOfMemoryError:
                print(f"{layout:<8}{cell.what:<8}batch {cell.batch:<4} context {cell.context:<6} does not fit")
                continue
            tokens = cell.batch * cell.width * rank.mesh.dp.count
            expected = expected_share(config, tokens)
            measured = took, roofline(cell, rank.mesh), rank.hit(cell), expected, options.activations
            row = Row(layout, *vars(cell).values(), *measured)
            rows.append(row)
            show(row)
        print(f"{layout}: {time.perf_counter() - began:.0f} s in all")
    return rows


def show(row: Row) -> None:
    print(
        f"{row.layout:<8}{row.what:<8}batch {row.batch:<4} context {row.context:<6} drafts {row.drafts}"
        f"{row.milliseconds:>10.2f} ms, roof {row.roof_milliseconds:>8.2f}, "
        f"{row.milliseconds / row.roof_milliseconds:>5.2f} times; hit {row.hit:.2f} of {row.hit_expected:.2f}"
        f"{'' if row.activations == 'bf16' else f'; {row.activations} activations'}",
        flush=True,
    )


def dry(options: argparse.Namespace, config: DeepseekV3Config) -> Iterator[str]:
    """Each cell's step on shapes alone, and which weights were asked for; raises where something does not fit."""
    device = torch.device("meta")
    roofline = Roofline(config, published(config, options.checkpoint), 3.077e12, 772e12)
    for layout in options.layout:
        rank = Rank(config, LAYOUTS[layout], options.checkpoint, Absent(0, RANKS[layout]), device)
        check_names(rank.names, config, rank.mesh)
        wanted = list(cells(options))
        rank.allocate(max(cell.batch * cell.blocks_each for cell in wanted) + 1)
        for cell in wanted:
            assert rank.fits(cell)
            runner = rank.runner(cell, recorded=False)
            runner.submit(rank.plan(cell))
            if cell.what == "decode":
                rank.start(runner, cell)
                runner.submit(rank.plan(cell, first=False))
            yield (
                f"{layout:<8}{cell.what:<8}batch {cell.batch:<4} context {cell.context:<6} drafts {cell.drafts}: "
                f"shapes fit; {roofline(cell, rank.mesh):.2f} ms at 3,077 GB/s and 772 TFLOP/s"
            )


def check_names(asked: Sequence[str], config: DeepseekV3Config, mesh: Mesh) -> None:
    """Every weight of the inventory was asked for once, but other ranks' experts and the MTP module's copies."""
    here = {index: set(mesh.experts(index, config.n_routed_experts)) for index in range(config.num_hidden_layers + 1)}
    wanted = [
        weight.name
        for weight in RandomRank(config, "v1", torch.device("meta"), mesh).inventory.values()
        if not (weight.layer == config.num_hidden_layers and weight.role in (Role.EMBEDDING, Role.HEAD))
        and (weight.role is not Role.ROUTED_EXPERT or int(weight.name.split(".")[5]) in here[weight.layer])
    ]
    if sorted(asked) != sorted(wanted):
        raise ValueError(f"asked for {len(asked)} weights, the model has {len(wanted)} for this rank")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["tp8", "tp8ep2", "ep8dp"])
    parser.add_argument("--checkpoint", choices=("v1", "v2"), default="v1", help="v2 has o_proj in NVFP4 too")
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--context", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--drafts", nargs="+", type=int, default=list(DRAFTS))
    parser.add_argument("--only", nargs="+", choices=("decode", "prefill"), default=["decode", "prefill"])
    parser.add_argument("--prompt", nargs="+", type=int, default=[8192], help="tokens of a prompt")
    parser.add_argument("--prompts", nargs="+", type=int, default=[1], help="that many at once")
    parser.add_argument("--layers", type=int, default=DEEPSEEK_R1.num_hidden_layers, help="fewer, to look closer")
    parser.add_argument("--activations", choices=("bf16", "fp8"), default="bf16", help="of NVFP4 weights")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--dry", action="store_true", help="every shape of every cell; needs no GPU")
    options = parser.parse_args()
    config = replace(DEEPSEEK_R1, num_hidden_layers=options.layers)
    with torch.inference_mode():
        if options.dry:
            for line in dry(options, config):
                print(line)
            return
        rows = measure(options, config)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "rows": [asdict(row) for row in rows]}, file, indent=1)


if __name__ == "__main__":
    main()
