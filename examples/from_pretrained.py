import torch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin import SamplingParams
from deepseek_fp4_plugin import LLM

# 示例：加载模型和运行推理
model = DeepseekV3ForCausalLM.from_pretrained("r1_nano")
llm = LLM(model, max_batch_size=1, max_new_tokens=100)

inputs = ["Hello, world!"]
sampling_params = SamplingParams(temperature=0.7, top_p=0.9, max_new_tokens=10)

outputs = llm.generate(inputs, sampling_params)
for output in outputs:
    print(output.text)

print("此 README 文件仅作为 deepseek-r1-fp4 模型的示例说明。实际使用请参照主插件文档。")
