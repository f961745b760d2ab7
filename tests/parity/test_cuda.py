"""On a GPU: the same model and engine give what they give on the CPU."""

import pytest
import torch

from deepseek_fp4_plugin import LLM, SamplingParams
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.numerics import nvfp4

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
