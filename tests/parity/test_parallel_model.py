"""The whole model over ranks (threads here; processes in tests/end_to_end/test_mappings.py) against one rank, FP32."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.parallel.collectives import Counting, Group, Separate
from deepseek_fp4_plugin.parallel.mesh import Mesh
from tests.ranks import MAPPINGS, on_mesh

TOKENS = torch.arange(21) * 37 % 320


@pytest.fixture(scope="module")
def whole(tiny_fp8):
    return DeepseekV3ForCausalLM.from_pretrained(tiny_fp8, dtype="float32")


@pytest.fixture(scope="module")
def load(tiny_fp8):
    """A mapping's ranks, loaded once; `connected` gives a rank's model its mesh's group."""
    loaded: dict[str, list[DeepseekV3ForCausalLM]] = {}

    def ranks(mapping: str) -> list[DeepseekV3ForCausalLM]:
        sizes = MAPPINGS[mapping]
        if mapping not in loaded:
            loaded[mapping] = [
                DeepseekV3ForCausalLM.from_pretrained(tiny_fp8, dtype="float32", mesh=Mesh(rank, **sizes))
                for rank in range(sizes["tensor_parallel_size"])
            ]
        return loaded[mapping]

    return ranks


def connect(model: DeepseekV3ForCausalLM, mesh: Mesh) -> None:
    for part in model.modules():
        if hasattr(part, "mesh"):
            part.mesh = mesh


def shares(mapping: str) -> list[list[int]]:
    """The tokens of each rank's sequence: the same everywhere, or its own, and the second rank idles."""
    tokens, sizes = TOKENS.tolist(), MAPPINGS[mapping]
    if not sizes.get("enable_attention_dp"):
        return [tokens] * sizes["tensor_parallel_size"]
    return [tokens[:5], [], tokens[2:13], tokens][: sizes["tensor_parallel_size"]]


def batch_of(mesh: Mesh, mapping: str) -> ForwardBatch:
    own = shares(mapping)
    tokens = own[mesh.rank]
    batch = ForwardBatch.from_sequences([tokens] if tokens else [])
    return replace(batch, dp_tokens=tuple(map(len, own))) if mesh.enable_attention_dp else batch


@torch.inference_mode()
def forward(model: DeepseekV3ForCausalLM, mesh: Mesh, mapping: str) -> dict[str, torch.Tensor]:
    """Everything that a step computes: hidden states, logits, the best tokens, and the MTP module's hidden states."""
    batch = batch_of(mesh, mapping)
    hidden = model(batch)
    cos, sin = model.model.rotary(batch.positions)
    embedded = model.model.embed_tokens(batch.input_ids)
    drafted = model.mtp(embedded, hidden, cos, sin, batch, None)
    logits = model.compute_logits(hidden)
    return {"hidden": hidden, "logits": logits, "best": model.lm_head.argmax(hidden), "mtp": drafted}


def over_ranks(load, mapping: str, change: Callable[[Mesh, DeepseekV3ForCausalLM], object] = lambda *_: None):
    """change: what to do to each rank's mesh and model first."""
    models = load(mapping)

    def run(mesh: Mesh) -> dict[str, torch.Tensor]:
        connect(models[mesh.rank], mesh)
        change(mesh, models[mesh.rank])
        return forward(models[mesh.rank], mesh, mapping)

    return on_mesh(mapping, run)


def expected(whole, mapping: str) -> list[dict[str, torch.Tensor]]:
    out = []
    for tokens in shares(mapping):
        batch = ForwardBatch.from_sequences([tokens] if tokens else [])
        with torch.inference_mode():
            hidden = whole(batch)
            cos, sin = whole.model.rotary(batch.positions)
            drafted = whole.mtp(whole.model.embed_tokens(batch.input_ids), hidden, cos, sin, batch, None)
            logits = whole.compute_logits(hidden)
        out.append({"hidden": hidden, "logits": logits, "best": logits.argmax(-1), "mtp": drafted})
    return out


def differs(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    return [
        name
        for name, value in wanted.items()
        if found[name].shape != value.shape or not torch.allclose(found[name], value, rtol=1e-4, atol=1e-4)
    ]


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_ranks_compute_what_one_does(whole, load, mapping):
    found = over_ranks(load, mapping)
    for own, wanted in zip(found, expected(whole, mapping), strict=True):
        assert differs(own, wanted) == []
    if not MAPPINGS[mapping].get("enable_attention_dp"):  # then every rank samples for itself
        for own in found[1:]:
            assert all(torch.equal(own[name], found[0][name]) for name in own)


class Without(Separate):
    """A group that leaves out its n-th collective, counted from 0; `names` are those that were asked for."""

    def __init__(self, inner: Group, left_out: int):
        self.inner, self.left_out = inner, left_out
        self.rank, self.size = inner.rank, inner.size
        self.names: list[str] = []

    def _call(self, name: str, x: torch.Tensor, *sizes) -> torch.Tensor:
        self.names.append(name)
        if len(self.names) - 1 != self.left_out:
            return getattr(self.inner, name)(x, *sizes)
        if name == "all_reduce":
            return x
        rows = list(sizes[0]) if sizes else [x.shape[0]] * self.size
        if name == "reduce_scatter":
            return x.split(rows)[self.rank]
        return torch.cat([x if rank == self.rank else x.new_zeros(n, *x.shape[1:]) for rank, n in enumerate(rows)])

    def all_reduce(self, x):
        return self._call("all_reduce", x)

    def all_gather(self, x, *sizes):
        return self._call("all_gather", x, *sizes)

    def reduce_scatter(self, x, *sizes):
        return self._call("reduce_scatter", x, *sizes)


# What a forward, the MTP module's and the head exchange, in order: the tiny model has one dense and two expert layers.
EXCHANGES = {
    "TP4/EP2": [
        ("embedding", "all_reduce"),
        *[(f"layer {layer} {block}", "all_reduce") for layer in range(3) for block in ("attention", "MLP")],
        ("embedding for the MTP module", "all_reduce"),
        ("MTP attention", "all_reduce"),
        ("MTP experts", "all_reduce"),
        ("logits", "all_gather"),
        ("best tokens", "all_gather"),
    ],
    "DP4/EP2": [
        *[
            (f"{way} the experts of {layer}", name)
            for layer in ("layer 1", "layer 2", "the MTP layer")
            for way, name in (("tokens to", "all_gather"), ("tokens from", "reduce_scatter"))
        ]
    ],
}


@pytest.mark.parametrize(
    ("mapping", "left_out"),
    [
        pytest.param(mapping, n, id=f"{mapping} {place}")
        for mapping, exchanges in EXCHANGES.items()
        for n, (place, _) in enumerate(exchanges)
    ],
)
def test_every_exchange_is_needed(whole, load, mapping, left_out):
    groups = []

    def leave_out(mesh: Mesh, model: DeepseekV3ForCausalLM) -> None:
        groups.append(Without(mesh.world, left_out))
        connect(model, mesh.connected(groups[-1]))

    found = over_ranks(load, mapping, leave_out)
    for group in groups:
        assert group.names == [name for _, name in EXCHANGES[mapping]]
    assert any(differs(own, wanted) for own, wanted in zip(found, expected(whole, mapping), strict=True))


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_bytes_exchanged_are_those_of_the_formula(whole, load, mapping):
    """The table of docs/parallelism.md, T tokens in FP32: the forward; and the head, and a draft step, of T rows."""
    models, config = load(mapping), whole.config
    layers, dense, hidden, width = config.num_hidden_layers, config.first_k_dense_replace, config.hidden_size, 4

    @torch.inference_mode()
    def run(mesh: Mesh) -> tuple[list[dict[str, int]], int]:
        counting, model, batch = Counting(mesh.world), models[mesh.rank], batch_of(mesh, mapping)
        connect(model, mesh.connected(counting))
        found = []
        states = model(batch)
        found.append(dict(counting.bytes))
        counting.bytes.clear()
        model.compute_logits(states)
        found.append(dict(counting.bytes))
        counting.bytes.clear()
        cos, sin = model.model.rotary(batch.positions)
        drafted = model.mtp(model.model.embed_tokens(batch.input_ids), states, cos, sin, batch, None)
        model.lm_head.argmax(drafted)
        found.append(dict(counting.bytes))
        return found, sum(batch.dp_tokens or [len(batch.input_ids)])

    for (forward, head, draft), tokens in on_mesh(mapping, run):
        row = tokens * hidden * width
        if MAPPINGS[mapping].get("enable_attention_dp"):
            assert forward == {"all_gather": (layers - dense) * row, "reduce_scatter": (layers - dense) * row}
            assert head == {} and draft == {"all_gather": row, "reduce_scatter": row}
        else:
            ranks = MAPPINGS[mapping]["tensor_parallel_size"]
            assert forward == {"all_reduce": (1 + 2 * layers) * row}
            assert head == {"all_gather": tokens * config.vocab_size * width}
            assert draft == {"all_reduce": 3 * row, "all_gather": 8 * tokens * ranks}


def test_a_batch_that_does_not_say_what_the_others_bring_is_refused(load):
    model = load("DP2")[0]
    connect(model, Mesh(0, 2, enable_attention_dp=True))
    with pytest.raises(ValueError, match="every rank's token count"), torch.inference_mode():
        model(ForwardBatch.from_sequences([[1, 2]]))


@pytest.mark.parametrize("mapping", ["TP4/EP2", "TP4/EP4 placed", "DP4/EP2"])
def test_the_load_of_experts_is_counted_over_all_ranks(whole, load, mapping):
    """Every rank counts the tokens of all, wherever the experts are."""
    chosen: list[list[torch.Tensor]] = [[], [], []]
    gates = [layer.mlp.gate for layer in (*whole.model.layers[1:], whole.mtp.layer)]
    hooks = [
        gate.register_forward_hook(lambda _, x, out, seen=seen: seen.append(out[0].flatten()))
        for gate, seen in zip(gates, chosen, strict=True)
    ]
    expected(whole, mapping)
    for hook in hooks:
        hook.remove()
    wanted = torch.stack([torch.bincount(torch.cat(seen), minlength=16) for seen in chosen])
    if not MAPPINGS[mapping].get("enable_attention_dp"):
        wanted //= len(shares(mapping))  # the same tokens went through the whole model once for each rank
    counts = []
    over_ranks(load, mapping, lambda mesh, model: counts.append(model.count_expert_load()))
    for count in counts:
        assert list(count) == [1, 2, 3] and torch.equal(torch.stack(list(count.values())), wanted)
