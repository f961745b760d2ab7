"""Two ranks on this machine, each with half of the model: python examples/two_ranks.py

Ranks are processes of their own. A script needs no `if __name__ == "__main__"` for them: it is not imported again.
"""

from deepseek_fp4_plugin import LLM, SamplingParams

with LLM(model="r1_nano", tensor_parallel_size=2, moe_expert_parallel_size=2) as llm:
    for output in llm.generate(["What is 7 + 8?", "What is 3 + 4?"], SamplingParams(max_tokens=64)):
        print(f"{output.prompt} {output.text!r}")
