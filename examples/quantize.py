"""FP8 checkpoint in, NVFP4 checkpoint out, text out of it: python examples/quantize.py [SOURCE] [DESTINATION]"""

import sys

from rich.console import Console

from deepseek_fp4_plugin import LLM, SamplingParams
from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint


def main(source: str = "r1_nano", destination: str = "./r1_nano-NVFP4") -> None:
    # For a real model calibrate on text like the text it will see: calibration="articles.jsonl" or "cnn_dailymail".
    report = quantize_checkpoint(source, destination, calibration="builtin", samples=64, tokens=256)
    report.render(Console())

    llm = LLM(model=destination)
    question = "What is 17 plus 25?"
    assert llm.tokenizer is not None
    prompt = llm.tokenizer.apply_chat_template([{"role": "user", "content": question}])
    output = llm.generate(prompt, SamplingParams(max_tokens=200))
    print(question)
    print(output.outputs[0].text)


if __name__ == "__main__":
    main(*sys.argv[1:])
