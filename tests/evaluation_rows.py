"""Invented rows in the exact formats of the benchmarks' own data, for tests: none is a question of theirs."""

import base64
import csv
import json
import pickle
import zlib
from pathlib import Path
from typing import Any


def _packed(tests: list[dict[str, str]]) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


_STDIN = [{"input": "2 3\n", "output": "5\n", "testtype": "stdin"}]
_CALLS = [{"input": "[1, 2, 3]\n2", "output": "[2, 4, 6]", "testtype": "functional"}]

ROWS: dict[str, list[dict[str, Any]]] = {
    "mmlu_pro": [
        {"question_id": 7, "question": "Which is a prime?", "options": ["4", "6", "7"], "answer": "C",
         "answer_index": 2, "category": "math", "src": "invented"},
        {"question_id": 8, "question": "Which is even?", "options": ["3", "8"], "answer": "B", "answer_index": 1,
         "category": "math", "src": "invented"},
    ],
    "gpqa_diamond": [
        {"Record ID": f"rec{i}", "Question": f"Invented question {i}?", "Correct Answer": "right",
         "Incorrect Answer 1": "wrong 1", "Incorrect Answer 2": "wrong 2", "Incorrect Answer 3": "wrong 3",
         "Subdomain": "none", "High-level domain": "none"}
        for i in range(12)
    ],
    "livecodebench": [
        {"question_id": "x1_A", "question_title": "Sum", "question_content": "Print the sum of two numbers.",
         "platform": "atcoder", "contest_id": "x1", "contest_date": "2024-08-01T00:00:00", "starter_code": "",
         "difficulty": "easy", "public_test_cases": json.dumps(_STDIN), "metadata": "{}",
         "private_test_cases": _packed([{"input": "10 -4\n", "output": "6\n", "testtype": "stdin"}])},
        {"question_id": "3", "question_title": "Scale", "question_content": "Multiply every entry.",
         "platform": "leetcode", "contest_id": "x2", "contest_date": "2024-09-01", "difficulty": "easy",
         "starter_code": "class Solution:\n    def scale(self, values, by):\n        ",
         "public_test_cases": json.dumps(_CALLS), "metadata": json.dumps({"func_name": "scale"}),
         "private_test_cases": _packed([{"input": "[]\n5", "output": "[]", "testtype": "functional"}])},
        {"question_id": "old", "question_title": "Old", "question_content": "Before the window.", "platform": "atcoder",
         "contest_id": "x0", "contest_date": "2023-05-07", "starter_code": "", "difficulty": "easy",
         "public_test_cases": "[]", "private_test_cases": _packed([]), "metadata": "{}"},
    ],
    "scicode": [
        {"problem_name": "invented", "problem_id": "901", "problem_description_main": "Work with squares.",
         "problem_background_main": "", "problem_io": "", "required_dependencies": "import numpy as np",
         "general_tests": [], "sub_steps": [
             {"step_number": "901.1", "step_description_prompt": "Square an array.", "step_background": "x*x",
              "ground_truth_code": "def square(x):\n    return x * x", "function_header": "def square(x):",
              "test_cases": ["x = np.arange(4.0)\nassert np.allclose(square(x), target)"]},
             {"step_number": "901.2", "step_description_prompt": "Sum the squares.", "step_background": "",
              "ground_truth_code": "def total(x):\n    return square(x).sum()", "function_header": "def total(x):",
              "test_cases": ["assert total(np.arange(3.0)) == target",
                             "assert (np.allclose(square(np.ones(2)), target[0]) and\n"
                             "        np.allclose(total(np.ones(2)), target[1]))",
                             "from scicode.compare.cmp import cmp_tuple_or_list\n"
                             "assert cmp_tuple_or_list((total(np.ones(2)), 1), target)"]},
         ]},
    ],
    "math_500": [
        {"problem": "What is one half plus one quarter?", "solution": "", "answer": "\\frac{3}{4}",
         "subject": "Algebra", "level": 1, "unique_id": "invented/1.json"},
        {"problem": "Solve $x^2 = 4$ for positive $x$.", "solution": "", "answer": "2", "subject": "Algebra",
         "level": 1, "unique_id": "invented/2.json"},
    ],
    "aime_2024": [{"id": 60, "problem": "What is 3 * 67?", "solution": "", "answer": "201", "url": "", "year": "2024"}],
    "gsm8k": [{"question": "Ann has 3 pens and buys 4. How many?", "answer": "3 + 4 = 7\n#### 7"}],
}  # fmt: skip


def write(folder: Path) -> dict[str, Path]:
    """A data file for each task, GPQA's as CSV, the others as JSON lines."""
    places = {}
    for task, rows in ROWS.items():
        path = folder / (f"{task}.csv" if task == "gpqa_diamond" else f"{task}.jsonl")
        with path.open("w", encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        places[task] = path
    return places
