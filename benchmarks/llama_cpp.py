"""Our engine and llama.cpp on the same random DeepSeek-architecture weights (268M parameters), taking turns.

    python benchmarks/llama_cpp.py write FOLDER
    python benchmarks/llama_cpp.py run FOLDER [--llama-bench BINARY --gguf NAME=FILE ...] [--repeats 7] [--json FILE]

`write` makes FOLDER/bf16 (for llama.cpp's convert_hf_to_gguf.py) and FOLDER/nvfp4 (every linear in NVFP4, for us).
llama.cpp is yours to build, for example from the sources inside the llama-cpp-python package:

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python; tar xf llama_cpp_python-*.tar.gz
    cd llama_cpp_python-*/vendor/llama.cpp
    cmake -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF \
          -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF; ninja -C build llama-bench llama-quantize
    python convert_hf_to_gguf.py FOLDER/bf16 --outtype bf16 --outfile bf16.gguf
    build/bin/llama-quantize bf16.gguf q4_0.gguf Q4_0
    build/bin/llama-quantize --tensor-type ".*=nvfp4" bf16.gguf nvfp4.gguf Q8_0

The converter refuses tokenizers that it does not know: make its get_vocab_base_pre return "deepseek-v3".
Rates are tokens a second for a prompt of 128 tokens and for 64 generated ones after it, as `llama-bench -p 128 -n 64`
measures them, with the same number of threads; medians over the turns.
"""

import argparse
import json
import random
import statistics
import subprocess
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from deepseek_fp4_plugin import LLM, SamplingParams
from deepseek_fp4_plugin.checkpoint.writer import CheckpointWriter, TensorSpec
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.inventory import Weight, weights
from deepseek_fp4_plugin.numerics import nvfp4

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
PROMPT, GENERATED = 128, 64


def write(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    plain, quantized = {}, {}
    for weight in weights(DeepseekV3Config.from_dict(CONFIG)):
        value = _random(weight, generator)
        plain[weight.name] = value
        if weight.linear:
            packed, scale, scale_2 = nvfp4.quantize(value)
            quantized[weight.name] = packed
            quantized[f"{weight.module}.weight_scale"] = scale
            quantized[f"{weight.module}.weight_scale_2"] = scale_2
        else:
            quantized[weight.name] = value
    section = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"]}
    _write(folder / "bf16", plain, {})
    hf_quant_config = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": section}
    _write(folder / "nvfp4", quantized, {"hf_quant_config.json": json.dumps(hf_quant_config)})
    _tokenizer().save(str(folder / "bf16" / "tokenizer.json"))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "bf16" / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    print(f"{sum(value.numel() for value in plain.values()) / 1e6:.1f}M parameters in {folder}")


def _random(weight: Weight, generator: torch.Generator) -> torch.Tensor:
    if len(weight.shape) == 1:
        return torch.zeros(weight.shape) if weight.name.endswith("bias") else torch.ones(weight.shape).bfloat16()
    return (torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5).bfloat16()


def _write(folder: Path, tensors: dict[str, torch.Tensor], files: dict[str, str]) -> None:
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = CheckpointWriter(folder, specs, {"kind": "benchmark"}, 10**10)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish({"config.json": json.dumps(CONFIG, indent=1), **files})


def _tokenizer() -> Tokenizer:
    """Byte-level BPE of the config's size over invented words: the converter wants one, nothing reads its text."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9))) for _ in range(20_000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words)], trainer)
    return tokenizer


def ours(llm: LLM) -> tuple[float, float]:
    """Prompt and generation tokens a second. A new salt, so that the prefix cache has nothing."""
    ids = [5 + 7 * i % 4000 for i in range(PROMPT)]

    def seconds(tokens: int) -> float:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        llm.generate(ids, params, cache_salt=str(began))
        return time.perf_counter() - began

    first = seconds(1)
    return PROMPT / first, GENERATED / (seconds(GENERATED + 1) - first)


def theirs(binary: str, model: str, threads: int) -> tuple[float, float]:
    command = [
        binary,
        "-m",
        model,
        "-p",
        str(PROMPT),
        "-n",
        str(GENERATED),
        "-t",
        str(threads),
        "-r",
        "1",
        "-o",
        "json",
    ]
    tests = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    prompt = next(test["avg_ts"] for test in tests if test["n_prompt"])
    return prompt, next(test["avg_ts"] for test in tests if test["n_gen"])


def run(folder: Path, binary: str | None, models_: list[str], repeats: int, threads: int, file: str | None) -> None:
    torch.set_num_threads(threads)
    rates: dict[str, list[tuple[float, float]]] = {}
    with LLM(folder / "nvfp4", max_batch_size=1) as llm:
        ours(llm)
        for _ in range(repeats):
            rates.setdefault("ours NVFP4", []).append(ours(llm))
            for entry in models_ if binary else []:
                name, path = entry.split("=", 1)
                rates.setdefault(f"llama.cpp {name}", []).append(theirs(str(binary), path, threads))
    rows = []
    print(f"{'engine':<24}{'prompt tok/s':>14}{'generation tok/s':>18}")
    for name, own in rates.items():
        prompt, generation = (statistics.median(values) for values in zip(*own, strict=True))
        rows.append({"engine": name, "threads": threads, "prompt": prompt, "generation": generation})
        print(f"{name:<24}{prompt:>14.0f}{generation:>18.0f}")
    if file:
        Path(file).write_text(json.dumps(rows, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("write").add_argument("folder", type=Path)
    runner = commands.add_parser("run")
    runner.add_argument("folder", type=Path)
    runner.add_argument("--llama-bench", metavar="BINARY")
    runner.add_argument("--gguf", nargs="+", default=[], metavar="NAME=FILE")
    runner.add_argument("--repeats", type=int, default=7)
    runner.add_argument("--threads", type=int, default=torch.get_num_threads())
    runner.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.command == "write":
        return write(options.folder)
    if options.gguf and not options.llama_bench:
        parser.error("--gguf needs --llama-bench")
    run(options.folder, options.llama_bench, options.gguf, options.repeats, options.threads, options.json)


if __name__ == "__main__":
    main()
