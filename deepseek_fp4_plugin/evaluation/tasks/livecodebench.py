"""LiveCodeBench: programming-contest problems, July 2024 to January 2025 of release_v5 (315), tests run in a sandbox.

Jain et al., LiveCodeBench: Holistic and Contamination Free Evaluation of Large Language Models for Code, arXiv
2403.07974. The problems belong to the contest sites. All tests must pass, each within six seconds.
"""

import base64
import io
import json
import pickle
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from deepseek_fp4_plugin.evaluation.answers import code_block
from deepseek_fp4_plugin.evaluation.sandbox import Limits
from deepseek_fp4_plugin.evaluation.task import Example, Grade, Settings, Source, Task, Tools

FIRST_DAY, LAST_DAY = "2024-07-01", "2025-01-01"
SECONDS = 6  # a test
_PRELUDE = """\
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
sys.setrecursionlimit(50000)
"""
_HARNESS = """\
if __name__ == "__main__":
    import json as _json
    _tests = _json.load(open("tests.json"))
    for _index, _test in enumerate(_tests):
        _given = [_json.loads(line) for line in _test["input"].split("\\n") if line.strip()]
        _got = getattr(Solution(), %(name)r)(*_given)
        _got = _json.loads(_json.dumps(_got))
        if _got != _json.loads(_test["output"]):
            print("test", _index, "failed", flush=True)
            sys.exit(3)
    print("every test passed")
"""


def prompt(example: Example) -> str:
    starter = example.extra["starter_code"]
    if starter:
        form = f"Complete this code and keep its names:\n```python\n{starter}\n```\n"
    else:
        form = "Read the input from standard input and print the answer to standard output.\n"
    return (
        f"Write a Python program that solves this problem and passes all its tests.\n\n{example.question}\n\n{form}"
        "Put the whole program into one ```python block at the end of your reply."
    )


def grade(example: Example, answers: Sequence[str], tools: Tools) -> list[Grade]:
    """Run the last block against the tests, in order, up to the first that fails."""
    (text,) = answers
    code = code_block(text)
    if not code.strip():
        return [Grade(False, None, "no code block")]
    tests = example.gold
    if example.extra["function"]:
        return [_functional(code, tests, example.extra["function"], tools)]
    for index, test in enumerate(tests):
        outcome = tools.sandbox.run(_PRELUDE + code, test["input"], limits=Limits(SECONDS))
        if outcome.stopped or outcome.status:
            why = f"stopped: {outcome.stopped}" if outcome.stopped else outcome.stderr.strip().split("\n")[-1][:200]
            return [Grade(False, code, f"test {index}: {why}")]
        if not _same_output(outcome.stdout, test["output"]):
            return [Grade(False, code, f"test {index}: wrong output")]
    return [Grade(True, code)]


def _functional(code: str, tests: list[dict[str, Any]], name: str, tools: Tools) -> Grade:
    content = json.dumps(tests).encode()
    limits = Limits(SECONDS * max(1, len(tests)))
    outcome = tools.sandbox.run(
        f"{_PRELUDE}{code}\n{_HARNESS % {'name': name}}", files={"tests.json": content}, limits=limits
    )
    if outcome.ok and outcome.stdout.rstrip().endswith("every test passed"):
        return Grade(True, code)
    lines = (outcome.stdout + outcome.stderr).strip().split("\n")
    return Grade(False, code, f"stopped: {outcome.stopped}" if outcome.stopped else lines[-1][:200])


def _same_output(got: str, expected: str) -> bool:
    """Line by line without blanks around; a line of numbers also where the numbers are equal."""
    left, right = ([line.strip() for line in text.strip().split("\n")] for text in (got, expected))
    if len(left) != len(right):
        return False
    return all(a == b or _numbers(a) == _numbers(b) != () for a, b in zip(left, right, strict=True))


def _numbers(line: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in line.split())
    except ValueError:
        return ()


def _examples(rows: Iterable[dict[str, Any]]) -> list[Example]:
    found = []
    for row in rows:
        if not FIRST_DAY <= str(row["contest_date"])[:10] <= LAST_DAY:
            continue
        tests = json.loads(row["public_test_cases"]) + _private_tests(row["private_test_cases"])
        metadata = row.get("metadata") or {}
        metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
        functional = any(test.get("testtype") == "functional" for test in tests)
        extra = {"starter_code": row["starter_code"], "function": metadata.get("func_name") if functional else None}
        found.append(Example(str(row["question_id"]), row["question_content"], tests, extra))
    return found


class _TextOnly(pickle.Unpickler):
    """The data set packs its hidden tests as a pickled string; nothing but plain values is unpickled."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"the tests hold an object of {module}.{name}")


def _private_tests(packed: Any) -> list[dict[str, Any]]:
    if not packed:
        return []
    if isinstance(packed, list):
        return packed
    try:
        return json.loads(packed)
    except ValueError:
        text = _TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(packed)))).load()
        return json.loads(text)


TASK = Task(
    name="livecodebench",
    title="LiveCodeBench",
    citation="arXiv 2403.07974",
    licence="the problems belong to the contest sites; the data set is CC",
    source=Source(
        "livecodebench/code_generation_lite",
        files=("test.jsonl", "test2.jsonl", "test3.jsonl", "test4.jsonl", "test5.jsonl"),
    ),
    examples=_examples,
    prompt=prompt,
    grade=grade,
    settings=Settings(repeats=3),
    card=(77.0, 76.3),
)
