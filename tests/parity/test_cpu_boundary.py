"""What the CPU kernels are given is checked before they see addresses: a wrong one is a sentence and changes nothing.

The kernels read and write raw memory, so each of these was a wrong result or a write into somebody else's memory.
"""

import pytest
import torch

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import cpu, ops
from deepseek_fp4_plugin.kernels.weights import WeightTensors

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU extension is not built")

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(BF16)


def plain(out: int, width: int, experts: int = 0):
    weight = bf16(*((experts,) if experts else ()), out, width)
    return ops.prepare([WeightTensors(WeightFormat.PLAIN, weight)], torch.device("cpu"), BF16, backend="cpu")


# ------------------------------------------------------------------ attention: 2 requests of 1 and 2 queries


def attention(**changes):
    """A sound call, but for the changes."""
    arguments = {
        "q_latent": bf16(3, 4, 32),
        "q_rope": bf16(3, 4, 16),
        "cache": bf16(6, 8, 48),
        "block_tables": torch.tensor([[4, 0, 9], [2, 5, 9]]),  # 9: beyond what is used, never looked at
        "query_start": torch.tensor([0, 1, 3]),
        "context_lens": torch.tensor([9, 16]),
    }
    arguments.update(changes)
    return cpu.absorbed_attention(*arguments.values(), max_query=2, max_context=16, scale=0.1)


def test_a_sound_call_passes(path):
    assert attention().isfinite().all()
    assert attention(cache=bf16(6, 8, 48).to(FP8)).isfinite().all()


INTS = torch.int32, torch.int16, torch.uint8, torch.float32


@pytest.mark.parametrize("dtype", INTS, ids=str)
@pytest.mark.parametrize("name", ["block_tables", "query_start", "context_lens"])
def test_tables_of_another_dtype(name, dtype):
    right = {
        "block_tables": torch.tensor([[4, 0, 5], [2, 5, 5]]),
        "query_start": torch.tensor([0, 1, 3]),
        "context_lens": torch.tensor([9, 16]),
    }[name]
    with pytest.raises(ValueError, match=f"{name} must be int64 .*; it is {str(dtype).removeprefix('torch.')}"):
        attention(**{name: right.to(dtype)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_tables": torch.tensor([[4, 6, 9], [2, 5, 9]])}, "a block id is 6; only 0 to 5 can be"),
        ({"block_tables": torch.tensor([[4, 0, 9], [-1, 5, 9]])}, "a block id is -1; only 0 to 5 can be"),
        ({"block_tables": torch.tensor([[4, 0, 9], [2, 2**40, 9]])}, "a block id is 1099511627776"),
        ({"context_lens": torch.tensor([9, 25])}, "a context length is 25; only 2 to 24 can be"),
        ({"context_lens": torch.tensor([0, 16])}, "a context length is 0; only 1 to 24 can be"),
        ({"context_lens": torch.tensor([-9, 16])}, "a context length is -9"),
        ({"context_lens": torch.tensor([9, 2**62])}, "a context length is"),
        ({"query_start": torch.tensor([0, 1, 4])}, "query_start is 4; only 1 to 3 can be"),
        ({"query_start": torch.tensor([0, 2, 1])}, "query_start is 1; only 2 to 3 can be"),
        ({"query_start": torch.tensor([1, 2, 3])}, "the first query_start is 1; only 0 to 0 can be"),
        ({"query_start": torch.tensor([0, 1, 2])}, "the last query_start is 2; only 3 to 3 can be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_numbers_that_lead_out_of_the_cache(path, changes, message):
    with pytest.raises(IndexError, match=message):
        attention(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_start": torch.tensor([0, 3])}, "query_start has 2 values for 2 requests"),
        ({"block_tables": torch.tensor([[4, 0, 9]])}, r"block_tables must be int64 \[2, 3\]"),
        ({"q_rope": bf16(2, 4, 16)}, r"q_rope must be bfloat16 \[3, 4, 16\]"),
        ({"q_rope": torch.randn(3, 4, 16)}, "the CPU kernels take BF16, not torch.float32"),
        ({"cache": bf16(6, 8, 40)}, r"one layer's latent cache must be bfloat16 \[6, 8, 48\]"),
        ({"cache": bf16(8, 6, 48).transpose(0, 1)}, "one layer's latent cache must be .*, contiguous"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attention_of_tensors_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        attention(**changes)


def test_tables_and_queries_may_be_cut_out_of_others():
    """Strides that the kernel can take, or that a copy makes whole, give the same result."""
    q, tables = bf16(3, 4, 48), torch.tensor([[4, 0], [2, 5]])
    contexts, cache = torch.tensor([[9, 0], [16, 0]]), bf16(6, 8, 48)
    cut = attention(
        q_latent=q[..., :32],
        q_rope=q[..., 32:],
        cache=cache,
        block_tables=torch.stack((tables, tables)).transpose(0, 2).transpose(0, 1)[..., 0],
        context_lens=contexts[:, 0],
    )
    whole = attention(
        q_latent=q[..., :32].contiguous(), q_rope=q[..., 32:].contiguous(), cache=cache, block_tables=tables
    )
    assert torch.equal(cut, whole)


# ------------------------------------------------------------------ the cache is written


@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("slot", [-1, 32, 2**50])
def test_a_slot_outside_the_cache_writes_nothing(path, dtype, slot):
    memory = torch.zeros(96, 24).to(dtype)
    cache = memory[32:64].view(4, 8, 24)  # with room on both sides, to see what is hit
    with pytest.raises(IndexError, match=f"a cache slot is {slot}; only 0 to 31 can be"):
        cpu.store_entries(cache, torch.tensor([3, slot, 5]), bf16(3, 24))
    assert not memory.view(torch.uint8).any()


@pytest.mark.parametrize(
    ("slots", "entries", "message"),
    [
        (torch.tensor([1, 2], dtype=torch.int32), bf16(2, 24), r"the slots must be int64 \[2\]"),
        (torch.tensor([1, 2, 3]), bf16(2, 24), r"the slots must be int64 \[2\]"),
        (torch.tensor([1, 2]), bf16(2, 16), r"the entries must be bfloat16 \[2, 24\]"),
    ],
)
def test_entries_and_slots_that_do_not_fit(slots, entries, message):
    with pytest.raises(ValueError, match=message):
        cpu.store_entries(torch.zeros(4, 8, 24, dtype=BF16), slots, entries)


# ------------------------------------------------------------------ experts


@pytest.mark.parametrize("expert", [4, -2, 2**33])
def test_an_expert_that_is_not_there(path, expert):
    gate_up, down = plain(32, 48, 4), plain(48, 16, 4)
    ids = torch.tensor([[0, 1], [3, expert]])
    with pytest.raises(IndexError, match=f"an expert id is {expert}; only -1 to 3 can be"):
        cpu.experts_mlp(bf16(2, 48), ids, torch.rand(2, 2), gate_up, down)
    with pytest.raises(IndexError, match="the expert is 4; only 0 to 3 can be"):
        cpu.linear(bf16(1, 48), gate_up, 4)


def test_experts_that_do_not_fit():
    ids, weights, x = torch.tensor([[0, 1]]), torch.rand(1, 2), bf16(1, 48)
    for gate_up, down in ((plain(32, 48, 4), plain(48, 16, 3)), (plain(32, 48, 4), plain(48, 20, 4))):
        with pytest.raises(ValueError, match=r"gate and up .* do not fit down"):
            cpu.experts_mlp(x, ids, weights, gate_up, down)
    with pytest.raises(ValueError, match=r"x must be bfloat16 \[1, 48\]"):
        cpu.experts_mlp(bf16(1, 32), ids, weights, plain(32, 48, 4), plain(48, 16, 4))
    with pytest.raises(ValueError, match=r"the experts' weights must be float32 \[1, 2\]"):
        cpu.experts_mlp(x, ids, torch.rand(1, 3), plain(32, 48, 4), plain(48, 16, 4))


# ------------------------------------------------------------------ the rest


ID = torch.zeros(1, dtype=torch.int64)
FP8_WEIGHT = torch.zeros(128, 256, dtype=torch.uint8).view(FP8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cpu.linear(bf16(2, 40), plain(8, 48)), r"x must be bfloat16 \[2, 48\].*it is bfloat16 \[2, 40\]"),
        (lambda: cpu.rms_norm(bf16(2, 48), bf16(40), 1e-6), r"the norm's weight must be bfloat16 \[48\]"),
        (lambda: cpu.rms_norm(bf16(2, 48), bf16(1).expand(48), 1e-6), "the norm's weight .* strides"),
        (lambda: cpu.rotary(bf16(3, 2, 16), torch.randn(2, 8), torch.randn(3, 8)), r"cos must be float32 \[3, 8\]"),
        (lambda: cpu.rotary(bf16(3, 2, 16), bf16(3, 8), torch.randn(3, 8)), "cos must be float32"),
        (lambda: cpu.rotary(bf16(3, 2, 15), torch.randn(3, 7), torch.randn(3, 7)), "turns pairs of values"),
        (lambda: cpu.route(bf16(2, 16), torch.zeros(16), 2, 4, 2, True, 1.0), "logits must be float32"),
        (lambda: cpu.route(torch.randn(2, 16), bf16(16), 2, 4, 2, True, 1.0), "the router's bias must be float32"),
        (lambda: cpu.route(torch.randn(2, 16), torch.zeros(8), 2, 4, 2, True, 1.0), r"bias must be float32 \[16\]"),
        (lambda: cpu.route(torch.randn(2, 16), torch.zeros(16), 9, 4, 2, True, 1.0), "cannot pick 9 of 16"),
        (lambda: cpu.latent_entries(bf16(3, 56), bf16(40), 1e-6, torch.randn(3, 7), torch.randn(3, 8)), "cos must be"),
        (lambda: cpu.latent_entries(bf16(3, 56), bf16(60), 1e-6, torch.randn(3, 8), torch.randn(3, 8)), "no latents"),
        (lambda: cpu.values_from_latent(bf16(2, 4, 24), plain(64, 32), 8), r"x must be bfloat16 \[2, 4, 32\]"),
        (lambda: cpu.absorb(bf16(2, 4, 17), plain(64, 32)), "17 rows of each of 4 heads do not fit"),
        (lambda: cpu.argmax(bf16(2, 0)), "no largest of no logits"),
        (lambda: cpu.step_inputs(ID, ID.int(), ID[:, None], ID[:, None], 1, 32), r"starts must be int64 \[1\]"),
        (
            lambda: cpu.step_inputs(ID, ID, ID[:, None], ID[:, None], 2, 32),
            "2 blocks of 32 tokens do not fit tables of 1",
        ),
        (
            lambda: cpu.prepare(
                [WeightTensors(WeightFormat.FP8_BLOCK, FP8_WEIGHT, torch.ones(1, 1))], BF16, "bf16", None
            ),
            r"its weight_scale_inv must be float32 \[1, 2\]",
        ),
        (
            lambda: cpu.prepare(
                [WeightTensors(WeightFormat.FP8_BLOCK, FP8_WEIGHT.view(torch.uint8), torch.ones(1, 2))],
                BF16,
                "bf16",
                None,
            ),
            "an FP8 weight must be float8_e4m3fn",
        ),
        (
            lambda: cpu.prepare(
                [
                    WeightTensors(
                        WeightFormat.NVFP4,
                        torch.zeros(8, 16, dtype=torch.uint8),
                        torch.ones(8, 2),
                        torch.ones(()),
                    )
                ],
                BF16,
                "bf16",
                None,
            ),
            "its weight_scale must be float8_e4m3fn",
        ),
        (
            lambda: cpu.prepare(
                [WeightTensors(WeightFormat.PLAIN, bf16(8, width)) for width in (32, 48)], BF16, "bf16", None
            ),
            r"a BF16 weight must be bfloat16 \[8, 32\]",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_tensor_that_is_not_on_the_cpu():
    with pytest.raises(ValueError, match=r"on the CPU, .* on meta"):
        cpu.rms_norm(torch.empty(2, 48, dtype=BF16, device="meta"), bf16(48), 1e-6)


# ------------------------------------------------------------------ recordings


def test_a_replay_checks_the_numbers_that_it_finds(path):
    """Shapes and dtypes were checked when it was recorded; slots, block ids and expert ids are new at every replay."""
    cache, entries, slots = torch.zeros(4, 8, 48, dtype=BF16), bf16(2, 48), torch.tensor([1, 2])
    tables, starts, contexts = torch.tensor([[0, 1]]), torch.tensor([0, 2]), torch.tensor([9])
    gate_up, down, ids, weights = plain(32, 32, 4), plain(32, 16, 4), torch.tensor([[0], [3]]), torch.rand(2, 1)
    q_latent, q_rope, x = bf16(2, 4, 32), bf16(2, 4, 16), bf16(2, 32)

    def step():
        cpu.store_entries(cache, slots, entries)
        attended = cpu.absorbed_attention(q_latent, q_rope, cache, tables, starts, contexts, 2, 16, 0.1)
        return attended, cpu.experts_mlp(x, ids, weights, gate_up, down)

    replay, results = cpu.Recorder().record(step)
    expected = [result.clone() for result in results]
    for tensor, at, wrong, message in (
        (slots, 1, 32, "a cache slot is 32"),
        (tables, (0, 1), 4, "a block id is 4"),
        (contexts, 0, 17, "a context length is 17"),
        (starts, 1, 3, "query_start is 3"),
        (ids, (1, 0), 7, "an expert id is 7"),
    ):
        right = tensor[at].clone()
        tensor[at] = wrong
        with pytest.raises(IndexError, match=message):
            replay()
        tensor[at] = right
        assert all(torch.equal(a, b) for a, b in zip(replay(), expected, strict=True))


def test_a_refused_call_is_no_part_of_a_recording():
    cache, entries, slots = torch.zeros(2, 8, 48, dtype=BF16), bf16(1, 48), torch.tensor([99])

    def step():
        with pytest.raises(IndexError, match="a cache slot is 99"):
            cpu.store_entries(cache, slots, entries)
        return (cpu.add(entries, entries),)

    replay, _ = cpu.Recorder().record(step)
    assert torch.equal(replay()[0], entries + entries)
