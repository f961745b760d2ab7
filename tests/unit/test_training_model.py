"""The trainable model equals the package's; rounding while training equals what export writes."""

from dataclasses import replace

import pytest
import torch

from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.layers.batch import Chunk, ForwardBatch, grouped
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.models.inventory import weights
from deepseek_fp4_plugin.numerics import fp8_block
from training.config import CONFIG, model_config
from training.data import Documents, pack
from training.export import export, load, named_weights
from training.model import Embed, Model, MoE
from training.optimizer import optimizers, orthogonalized
from training.quantize import fp8_rounded, rounded
from training.train import losses, to_device


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model = Model(model_config())
    for module in model.modules():
        if isinstance(module, MoE):
            module.bias.normal_(std=0.05)
    folder = tmp_path_factory.mktemp("training") / "r1_nano"
    export(model, folder)
    return folder, model


@torch.inference_mode()
def test_logits_and_drafts_equal_the_package_model(exported):
    folder, _ = exported
    ours = load(folder, torch.float32).eval()
    package = DeepseekV3ForCausalLM.from_pretrained(folder, dtype="float32")
    sequences = [torch.randint(0, 900, (n,)).tolist() for n in (30, 50, 7)]
    batch = ForwardBatch.from_sequences(sequences)
    ids = batch.input_ids.unsqueeze(0)
    documents = torch.cat([torch.full((len(s),), i) for i, s in enumerate(sequences)]).unsqueeze(0)
    positions = batch.positions.unsqueeze(0)
    hidden = ours(ids, positions, documents)
    expected = package(batch)
    assert (package.compute_logits(expected) - ours.logits(hidden)[0]).abs().max() < 1e-4
    # Drafts of a chain that starts at column 20 of the first sequence, over the package's paged cache.
    outputs = ours.drafts(hidden, ids, positions, documents, 3)
    assert package.mtp is not None
    cache = torch.full((8, 8, package.config.latent_dim), float("nan"))
    blocks = torch.tensor([[3, 1, 6, 2]])
    state, first, length = expected[:21], 0, 21
    for step in range(3):
        place = torch.arange(first, first + length)
        tokens = torch.tensor(sequences[0])[place + 1]
        cos, sin = package.model.rotary(place)
        forward = ForwardBatch(
            input_ids=tokens,
            positions=place,
            slot_mapping=blocks[0, place // 8] * 8 + place % 8,
            block_tables=blocks,
            context_lens=torch.tensor([first + length]),
            groups=grouped([Chunk(0, 0, length, first + length)], blocks.device, blocks, 8),
        )
        state = package.mtp(package.model.embed_tokens(tokens), state, cos, sin, forward, cache)[-1:]
        assert (state[0] - outputs[step][0, 20]).abs().max() < 1e-4
        first, length = first + length, 1


def test_export_is_a_checkpoint_as_deepseek_publishes(exported):
    folder, _ = exported
    reader = CheckpointReader(folder)
    config = DeepseekV3Config.from_folder(folder)
    for weight in weights(config):
        info = reader.info(weight.name)
        assert info.shape == weight.shape
        if weight.linear:
            assert info.dtype == torch.float8_e4m3fn
            assert reader.info(f"{weight.module}.weight_scale_inv").dtype == torch.float32
        else:
            assert info.dtype == (torch.float32 if weight.name.endswith("bias") else torch.bfloat16)
    mtp = f"model.layers.{config.num_hidden_layers}"
    assert torch.equal(reader.get(f"{mtp}.embed_tokens.weight"), reader.get("model.embed_tokens.weight"))
    assert torch.equal(reader.get(f"{mtp}.shared_head.head.weight"), reader.get("lm_head.weight"))
    assert len(list(folder.glob("*.safetensors"))) >= 2


def test_transformers_opens_the_shipped_checkpoint():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from deepseek_fp4_plugin.checkpoint.hub import embedded_folder

    config = transformers.AutoConfig.from_pretrained(embedded_folder())
    assert config.model_type == "deepseek_v3"
    assert config.n_routed_experts == CONFIG["n_routed_experts"]
    shipped = sum(path.stat().st_size for path in embedded_folder().glob("*.safetensors"))
    assert shipped <= 40e6


def test_rounding_in_training_equals_the_exported_values(exported):
    w = torch.randn(160, 256)  # a last block that is not full
    assert torch.equal(fp8_rounded(w), fp8_block.dequantize(*fp8_block.quantize(w), torch.float32))
    folder, model = exported
    stored = named_weights(load(folder))
    before = {name: value.clone() for name, value in named_weights(model).items()}
    with rounded(model, nvfp4_layers=False):
        for name, value in named_weights(model).items():
            assert torch.equal(value, stored[name]), name
    assert all(torch.equal(value, before[name]) for name, value in named_weights(model).items())


def test_a_document_does_not_see_its_neighbours():
    model = Model(model_config(), torch.float32).eval()
    ids = torch.randint(0, 900, (2, 24))
    ids[1, 10:] = ids[0, 10:]  # rows differ in the first document only
    positions = torch.cat((torch.arange(10), torch.arange(14))).expand(2, -1)
    documents = torch.tensor([0] * 10 + [1] * 14).expand(2, -1)
    with torch.inference_mode():
        hidden = model(ids, positions, documents)
        drafts = model.drafts(hidden, ids, positions, documents, 3)
    for output in (hidden, *drafts):
        torch.testing.assert_close(output[0, 10:20], output[1, 10:20])
        assert (output[0, 5] - output[1, 5]).abs().max() > 0.01


def test_a_few_steps_learn_and_balance():
    small = replace(model_config(), hidden_size=64, num_hidden_layers=2, n_routed_experts=16, moe_intermediate_size=32)
    model = Model(small, torch.float32).train()
    batch = to_device(pack(Documents(1, []), 1, 256), "cpu")
    steps = optimizers(model, 4e-3, 3e-3)
    seen = []
    for _ in range(6):
        means = losses(model, batch)
        means.sum().backward()
        seen.append(means.detach())
        for optimizer in steps:
            optimizer.step()
            optimizer.zero_grad()
    assert (seen[-1] < seen[0] - 0.5).all()
    experts = next(m for m in model.modules() if isinstance(m, MoE))
    busiest, idlest = experts.load.argmax(), experts.load.argmin()
    experts.balance(0.001)
    assert experts.bias[busiest] < 0 < experts.bias[idlest]
    assert experts.load.sum() == 0


def test_embedding_gradient_equals_indexing():
    weight, ids, grad = torch.randn(10, 4, requires_grad=True), torch.randint(0, 10, (3, 5)), torch.randn(3, 5, 4)
    Embed.apply(weight, ids).backward(grad)
    ours, weight.grad = weight.grad, None
    weight[ids].backward(grad)
    torch.testing.assert_close(ours, weight.grad)


def test_orthogonalized_has_singular_values_near_one():
    for shape in ((64, 32), (3, 32, 64)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape)))
        assert values.min() > 0.3
        assert values.max() < 1.5
