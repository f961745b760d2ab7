"""lm-eval's local-chat-completions and local-completions against a real server: generation and log-likelihoods.

lm-eval is taken from PATH, or installed into an environment of its own.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from deepseek_fp4_plugin.assets.held_out import load_held_out
from tests.end_to_end.server_process import R1_NANO, running_server

GENERATE = """task: nano_generate
dataset_path: json
dataset_kwargs:
  data_files:
    test: problems.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["<｜User｜>"]
  max_gen_toks: 512
  do_sample: false
filter_list:
  - name: box
    filter:
      - function: regex
        regex_pattern: "boxed\\\\{(.*?)\\\\}"
        group_select: -1
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
CHOOSE = """task: nano_choose
dataset_path: json
dataset_kwargs:
  data_files:
    test: choices.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory) -> str:
    if found := shutil.which("lm_eval"):
        return found
    folder = tmp_path_factory.mktemp("lm_eval") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "pip"), "install", "-q", "lm-eval[api]", "transformers==5.23.0"]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"lm-eval cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return str(folder / "bin" / "lm_eval")


@pytest.mark.proof
def test_lm_eval_scores_r1_nano_over_http(lm_eval, tmp_path):
    problems = [p for p in load_held_out() if p.family in ("add_subtract", "multiply") and p.language == "en"][:8]
    generate = [{"prompt": p.prompt, "answer": p.answer} for p in problems]
    choose = [
        {
            "prompt": f"<｜begin▁of▁sentence｜><｜User｜>{p.prompt}<｜Assistant｜>",
            "choices": ["zzqq", "<think>\n"],
            "label": 1,
        }
        for p in problems
    ]
    for name, rows in (("problems", generate), ("choices", choose)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "generate.yaml").write_text(GENERATE)
    (tmp_path / "choose.yaml").write_text(CHOOSE)

    def score(model: str, arguments: str, tasks: str, *more: str) -> list[float]:
        command = [lm_eval, "run", "--model", model, "--model_args", arguments, "--tasks", tasks,
                   "--include_path", ".", *more]  # fmt: skip
        offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=offline, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return [float(value) for value in re.findall(r"↑\s*\|\s*([\d.]+)\|±", done.stdout)]

    flags = ["--mtp", "3", "--max_batch_size", "8", "--max_seq_len", "2048", "--reasoning_parser", "deepseek-r1-0528"]
    with running_server(tmp_path, *flags) as server:
        common = f"model={server.name},num_concurrent=4,max_retries=1,tokenized_requests=False"
        chat = score("local-chat-completions", f"{common},base_url={server.url}/v1/chat/completions", "nano_generate",
                     "--apply_chat_template")  # fmt: skip
        plain = score("local-completions", f"{common},base_url={server.url}/v1/completions,"
                      f"tokenizer_backend=huggingface,tokenizer={R1_NANO}",
                      "nano_choose,nano_generate")  # fmt: skip
    print(f"\nlm-eval: chat exact match {chat}, plain accuracy and exact match {plain}")
    assert len(chat) == 1
    assert len(plain) == 2
    assert min(chat + plain) >= 0.75
