"""Our engine and llama.cpp on the same random DeepSeek-architecture weights (268M parameters), taking turns.

    python benchmarks/llama_cpp.py write FOLDER
    python benchmarks/llama_cpp.py run FOLDER [--llama-bench BINARY --gguf NAME=FILE ...] [--repeats 7] [--prompt 128]
        [--activations bf16 int8] [--path avx2] [--json FILE]

`write` makes FOLDER/bf16 (for llama.cpp's convert_hf_to_gguf.py) and FOLDER/nvfp4 (every linear in NVFP4, for us).
llama.cpp is yours to build, for example from the sources inside the llama-cpp-python package:

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python; tar xf llama_cpp_python-*.tar.gz
    cd llama_cpp_python-*/vendor/llama.cpp
    cmake -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF \
          -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF; ninja -C build llama-bench llama-quantize
    python convert_hf_to_gguf.py FOLDER/bf16 --outtype bf16 --outfile bf16.gguf
    build/bin/llama-quantize bf16.gguf q4_0.gguf Q4_0
    build/bin/llama-quantize --tensor-type ".*=nvfp4" bf16.gguf nvfp4.gguf Q8_0

To measure a processor with AVX-512 as if it had none: --path avx2 for us, and for them a build with -DGGML_NATIVE=OFF,
-DGGML_AVX2=ON, -DGGML_FMA=ON, -DGGML_F16C=ON and -DGGML_BMI2=ON.

The converter refuses tokenizers that it does not know: make its get_vocab_base_pre return "deepseek-v3".
Rates are tokens a second for a prompt and for 64 generated ones, as `llama-bench -p 128 -n 64` measures them (its
generated tokens have no prompt before them, ours have), with the same number of threads; medians over the turns.
"""

import argparse
import json
import random
import statistics
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from deepseek_fp4_plugin import LLM, SamplingParams
from deepseek_fp4_plugin.kernels import cpu

from random_checkpoint import CONFIG, write_checkpoint  # isort: skip

GENERATED = 64


def write(folder: Path) -> None:
    count = write_checkpoint(folder / "bf16", CONFIG, quantized=False)
    write_checkpoint(folder / "nvfp4", CONFIG, quantized=True)
    _tokenizer().save(str(folder / "bf16" / "tokenizer.json"))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "bf16" / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    print(f"{count / 1e6:.1f}M parameters in {folder}")


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


def ours(llm: LLM, prompt: int) -> tuple[float, float]:
    """Prompt and generation tokens a second. A new salt, so that the prefix cache has nothing."""
    ids = [5 + 7 * i % 4000 for i in range(prompt)]

    def seconds(tokens: int) -> float:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        llm.generate(ids, params, cache_salt=str(began))
        return time.perf_counter() - began

    first = seconds(1)
    return prompt / first, GENERATED / (seconds(GENERATED + 1) - first)


def theirs(binary: str, model: str, threads: int, prompt: int) -> tuple[float, float]:
    command = [
        binary,
        "-m",
        model,
        "-p",
        str(prompt),
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
    prefill = next(test["avg_ts"] for test in tests if test["n_prompt"])
    return prefill, next(test["avg_ts"] for test in tests if test["n_gen"])


def run(
    folder: Path,
    binary: str | None,
    models_: list[str],
    activations: list[str],
    repeats: int,
    threads: int,
    prompt: int,
    file: str | None,
) -> None:
    torch.set_num_threads(threads)
    rates: dict[str, list[tuple[float, float]]] = {}
    with ExitStack() as stack:
        llms = {
            kind: stack.enter_context(LLM(folder / "nvfp4", max_batch_size=1, nvfp4_activations=kind))
            for kind in activations
        }
        for llm in llms.values():
            ours(llm, prompt)
        for _ in range(repeats):
            for kind, llm in llms.items():
                rates.setdefault(f"ours NVFP4, {kind}", []).append(ours(llm, prompt))
            for entry in models_ if binary else []:
                name, path = entry.split("=", 1)
                rates.setdefault(f"llama.cpp {name}", []).append(theirs(str(binary), path, threads, prompt))
    rows = []
    print(f"{'engine':<24}{'prompt tok/s':>14}{'generation tok/s':>18}")
    for name, own in rates.items():
        prefill, generation = (statistics.median(values) for values in zip(*own, strict=True))
        rows.append({"engine": name, "threads": threads, "prompt": prefill, "generation": generation})
        print(f"{name:<24}{prefill:>14.0f}{generation:>18.0f}")
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
    runner.add_argument("--activations", nargs="+", choices=("bf16", "fp4", "int8"), default=["bf16"], help="of ours")
    runner.add_argument("--repeats", type=int, default=7)
    runner.add_argument("--prompt", type=int, default=128, help="tokens")
    runner.add_argument("--threads", type=int, default=torch.get_num_threads())
    runner.add_argument(
        "--path", choices=("avx512", "avx2_vnni", "avx2", "portable"), help="another instruction set for us"
    )
    runner.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.command == "write":
        return write(options.folder)
    if options.gguf and not options.llama_bench:
        parser.error("--gguf needs --llama-bench")
    with cpu.use_path(options.path or cpu.path()):
        run(
            options.folder,
            options.llama_bench,
            options.gguf,
            options.activations,
            options.repeats,
            options.threads,
            options.prompt,
            options.json,
        )


if __name__ == "__main__":
    main()
