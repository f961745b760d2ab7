"""README.md of a quantized checkpoint, from the run's facts alone: the same run writes the same bytes."""

from pathlib import Path
from typing import Any

import torch
import yaml

from deepseek_fp4_plugin.checkpoint.quant_config import PRODUCER
from deepseek_fp4_plugin.checkpoint.sizes import size_text
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.numerics import nvfp4
from deepseek_fp4_plugin.quantization.cache_scales import HEADROOM
from deepseek_fp4_plugin.quantization.calibrate import SAFE_INPUT_SCALE
from deepseek_fp4_plugin.quantization.recipes import RECIPES
from deepseek_fp4_plugin.quantization.report import WORST, QuantizationReport, decibels
from deepseek_fp4_plugin.quantization.smoothing import MANIFEST

BENCHMARKS = ("MMLU Pro", "GPQA Diamond", "LiveCodeBench", "SCICODE", "MATH-500", "AIME 2024")
# By quantize's --format.
_PROGRAMS = {"modelopt": "ModelOpt", "compressed-tensors": "compressed-tensors"}
_FORMATS = {
    "modelopt": f"""ModelOpt
{PRODUCER["version"]}: `weight`, `weight_scale`, `weight_scale_2` and `input_scale` of a module, `hf_quant_config.json`,
and the same in `config.json`""",
    "compressed-tensors": """compressed-tensors
(`nvfp4-pack-quantized`): `weight_packed`, `weight_scale`, `weight_global_scale` and `input_global_scale` of a module,
and `quantization_config` in `config.json`""",
}
_CNN_DAILYMAIL = "https://huggingface.co/datasets/abisee/cnn_dailymail"


def source_facts(source: str, folder: Path) -> dict[str, Any]:
    """The source's name, and what its own card says: license with name and link, language, task.

    Of a local folder only the last part of its path is named, as a card is written to be published.
    """
    card = _front_matter(folder / "README.md")
    name = folder.resolve().name if Path(source).is_dir() else source
    facts: dict[str, Any] = {"pipeline_tag": card.get("pipeline_tag", "text-generation"), "base_model": [name]}
    for key in ("license", "license_name", "license_link", "language"):
        if card.get(key):
            facts[key] = card[key]
    if "license" not in facts and (folder / "LICENSE").is_file():
        facts.update(license="other", license_name="see-license-file", license_link="LICENSE")
    return facts


def model_card(facts: dict[str, Any], report: QuantizationReport, config: DeepseekV3Config, version: str) -> str:
    """facts: of `source_facts`.  version: of this package."""
    name, source = Path(report.destination).resolve().name, facts["base_model"][0]
    front = {
        **facts,
        "library_name": "deepseek_fp4_plugin",
        "tags": ["DeepSeekV3", "NVFP4", "FP4", "quantized", _PROGRAMS[report.format]],
    }
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {name}",
        _description(source, report, config, version),
        _architecture(config),
        _calibration(report),
        _sizes(report),
        _usage(name, _PROGRAMS[report.format]),
        _evaluation(),
        _limitations(source),
        _license(facts, source),
    ]
    return "\n\n".join(sections) + "\n"


def _description(source: str, report: QuantizationReport, config: DeepseekV3Config, version: str) -> str:
    mtp = ", the MTP layer included" if config.num_nextn_predict_layers and report.mtp == "bf16" else ""
    last = ", those of the MTP layer included," if report.mtp == "nvfp4" else ""
    attention = " and the attention's output projections" if report.layout == "v2" else ""
    return f"""## Description

{source} with the weights and the input activations of its MLPs{attention}{last} in NVFP4:
4-bit E2M1 values in blocks of 16 with one FP8 (E4M3) scale a block and one FP32 scale a tensor. Everything else is
BF16{mtp}.

Made by `deepseek_fp4_plugin` {version}, recipe `{report.recipe}`, layout `{report.layout}`, in the format of {
        _FORMATS[report.format]
    }. The cache is asked for in {_cache(report)}."""


def _cache(report: QuantizationReport) -> str:
    if report.kv_cache != "fp8":
        return "BF16"
    if not report.kv_scales:
        return "FP8"
    return f"FP8, with calibrated scales of\nits layers, powers of two for {HEADROOM:g} times what was seen"


def _architecture(c: DeepseekV3Config) -> str:
    moe = sum(map(c.is_moe_layer, range(c.num_hidden_layers)))
    mtp = "with" if c.num_nextn_predict_layers else "without"
    return f"""## Model architecture

DeepSeek-V3 (`DeepseekV3ForCausalLM`) with {c.num_hidden_layers} layers, hidden size {c.hidden_size} and
{c.num_attention_heads} heads; {moe} layers have {c.n_routed_experts} routed experts, {c.num_experts_per_tok} a token,
and {c.n_shared_experts} shared; {mtp} a multi-token-prediction layer. Input and output: text, up to
{c.max_position_embeddings} tokens."""


def _calibration(report: QuantizationReport) -> str:
    if not report.samples:
        return f"""## Post-training quantization

Input scales were not calibrated. Every one is {SAFE_INPUT_SCALE}: activations saturate where a block of 16 goes beyond
2688 and lose precision where its largest value is below 0.1. {report.quantized_modules} linears are NVFP4."""
    text = report.calibration
    if text.startswith("cnn_dailymail"):
        text = text.replace("cnn_dailymail", f"[cnn_dailymail]({_CNN_DAILYMAIL})", 1)
    zeros = ""
    if report.zero_inputs:
        first, more = report.zero_inputs[:WORST], len(report.zero_inputs) - WORST
        names = ", ".join(f"`{module}`" for module in first) + (f" and {more} more" if more > 0 else "")
        zeros = f"""

The inputs of {names} were all zero, which every scale decodes exactly;
their input scale is {SAFE_INPUT_SCALE}."""
    recipe = RECIPES[report.recipe.partition(" ")[0]]
    through = (
        "each layer behind the quantized ones before it" if recipe.sequential else "through the source's own weights"
    )
    one = torch.ones(())
    room = float(recipe.input_scale(one) / nvfp4.tensor_scale(one))
    scale = f", {room:g} times what the largest input needs" if room > 1 else ""
    return f"""## Post-training quantization

Input scales were calibrated on {text}: {report.samples} samples,
{report.tokens} tokens in all, {through}. {report.quantized_modules} linears are NVFP4. All
experts of a layer share their input scales{scale}; {report.cold_experts} expert projections saw no token
themselves.{zeros}{_smoothing(report)}"""


def _smoothing(report: QuantizationReport) -> str:
    if not report.smooth:
        return ""
    return f"""

The norms before the MLPs are smoothed: their weights are divided by powers of two, channel by channel, and the routers
and the weights of gate and up multiplied by them. `{MANIFEST}` lists the tensors that so differ from the source's."""


def _sizes(report: QuantizationReport) -> str:
    rows = [(name, count) for name, count in report.size.items()]
    rows += [("**all**", report.total), ("all without the MTP layer", report.without_mtp)]
    lines = ["| | before | after | ratio | SQNR dB |", "|---|---|---|---|---|"]
    for label, count in rows:
        error = decibels(report.sqnr_db[label]) if label in report.sqnr_db else ""
        lines.append(
            f"| {label} | {size_text(count.before)} | {size_text(count.after)} | {count.ratio:.2f}x | {error} |"
        )
    worst = ", ".join(f"`{module.module}` ({decibels(module.sqnr_db)} dB)" for module in report.worst)
    return "## Size and error\n\n" + "\n".join(lines) + f"\n\nLargest error: {worst}."


def _usage(name: str, program: str) -> str:
    return f"""## Usage

```python
from deepseek_fp4_plugin import LLM, SamplingParams


def main():
    prompts = [
        "Hello, my name is",
        "The president of the United States is",
        "The capital of France is",
        "The future of AI is",
    ]
    sampling_params = SamplingParams(max_tokens=32)

    llm = LLM(model="./{name}")

    outputs = llm.generate(prompts, sampling_params)

    # Print the outputs.
    for output in outputs:
        prompt = output.prompt
        generated_text = output.outputs[0].text
        print(f"Prompt: {{prompt!r}}, Generated text: {{generated_text!r}}")


if __name__ == "__main__":
    main()
```

Or from a shell: `deepseek-fp4 chat ./{name}`, `deepseek-fp4 serve ./{name}`. Any runtime that reads {program}'s NVFP4
checkpoints of this architecture can load the folder.

Temperature 0.6 (0.5 to 0.7) and top-p 0.95 are recommended; put all instructions into the user's message; for maths
ask: "Please reason step by step, and put your final answer within \\boxed{{}}."."""


def _evaluation() -> str:
    head = " | ".join(("Precision", *BENCHMARKS))
    blank = " | ".join(["not measured yet"] * len(BENCHMARKS))
    return f"""## Evaluation

| {head} |
|{"---|" * (len(BENCHMARKS) + 1)}
| source | {blank} |
| NVFP4 | {blank} |"""


def _limitations(source: str) -> str:
    return f"""## Limitations

The limitations of {source} apply. The base model may have learned biases and toxic language from its training
text and may answer wrongly or leave out what matters. Rounding to 4 bits adds errors of its own; measure this
checkpoint on your task before you rely on it. FP4
activations are scaled from the calibration text: text unlike it may saturate."""


def _license(facts: dict[str, Any], source: str) -> str:
    name = facts.get("license")
    return f"## License\n\n{name if name else f'As {source}, whose card names none.'}" + (
        f" ([text]({facts['license_link']}))" if facts.get("license_link") else ""
    )


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML between the first two `---` lines of a card; nothing where there is none or it is not YAML."""
    if not path.is_file():
        return {}
    parts = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        content = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}
