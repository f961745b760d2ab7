"""SciCode: research code in steps; 65 problems (288 graded steps), and 15 development problems (50 steps).

Tian et al., SciCode: A Research Coding Benchmark Curated by Scientists, arXiv 2407.13168. Apache-2.0. Steps are asked
in order, each with the model's own earlier code and with the scientists' background; a step is right when its function
passes its tests on top of that code. Targets of the test problems are in a file of their own (test_data.h5, from the
authors); those of the development problems are computed from the reference code.
"""

import ast
import base64
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from deepseek_fp4_plugin.evaluation.answers import code_block
from deepseek_fp4_plugin.evaluation.sandbox import Limits
from deepseek_fp4_plugin.evaluation.task import Conversation, Example, Grade, Settings, Source, Task, Tools

TARGETS = "test_data.h5"
LIMITS = Limits(seconds=120, memory=8 << 30)
# Given by the authors, not asked: problem and step.
_GIVEN = {"13.6", "62.1", "76.3"}

_COMPARE = """
def cmp_tuple_or_list(a, b):
    import numpy as _np
    if len(a) != len(b):
        return False
    return all(bool(_np.allclose(x, y)) if hasattr(x, "shape") or isinstance(x, (int, float, complex)) else x == y
               for x, y in zip(a, b))
def are_dicts_close(a, b):
    import numpy as _np
    return set(a) == set(b) and all(_np.allclose(a[k], b[k]) for k in a)
import sys as _sys, types as _types
for _name in ("scicode", "scicode.compare", "scicode.compare.cmp"):
    _sys.modules[_name] = _types.ModuleType(_name)
_sys.modules["scicode.compare.cmp"].cmp_tuple_or_list = cmp_tuple_or_list
_sys.modules["scicode.compare.cmp"].are_dicts_close = are_dicts_close
"""
# Reads what the authors' file holds of one step: one value or a tuple of them a test.
_READ_H5 = """
def _value(node):
    import h5py
    if isinstance(node, h5py.Dataset):
        value = node[()]
        return value.decode() if isinstance(value, bytes) else value
    if "list" in node:
        return [_value(node["list"][key]) for key in node["list"]]
    if "sparse_matrix" in node:
        import scipy.sparse
        m = node["sparse_matrix"]
        shape = m["shape"][()]
        if "row" in m:
            return scipy.sparse.coo_matrix((m["data"][()], (m["row"][()], m["col"][()])), shape=shape)
        return scipy.sparse.csr_matrix((m["data"][()], m["indices"][()], m["indptr"][()]), shape=shape)
    return {key: _value(node[key]) for key in node}
def _targets():
    import h5py
    with h5py.File("targets.h5") as file:
        tests = [file[key] for key in sorted(file, key=lambda k: int(k[4:]))]
        values = [[_value(test[key]) for key in test] for test in tests]
    return [value[0] if len(value) == 1 else tuple(value) for value in values]
"""
_READ_PICKLE = """
def _targets():
    import pickle
    with open("targets.pickle", "rb") as file:
        return pickle.load(file)
"""


def converse(example: Example) -> Conversation:
    """One prompt a step that is asked."""
    problem = example.extra
    earlier: list[str] = []
    for step in problem["sub_steps"]:
        if _given(step):
            earlier.append(step["ground_truth_code"])
            continue
        answer = yield _prompt(problem, step, earlier)
        earlier.append(code_block(answer))


def _given(step: dict[str, Any]) -> bool:
    return step["step_number"] in _GIVEN and bool(step.get("ground_truth_code"))


def _prompt(problem: dict[str, Any], step: dict[str, Any], earlier: list[str]) -> str:
    done = ""
    if earlier:
        joined = "\n\n".join(earlier)
        done = f"The steps before are written already and may be called:\n```python\n{joined}\n```\n\n"
    background = f"Background:\n{step['step_background']}\n\n" if step.get("step_background") else ""
    return (
        f"You write a scientific program step by step. The whole problem:\n{problem['problem_description_main']}\n\n"
        f"{done}Write the next step now.\n{step['step_description_prompt']}\n\n{background}"
        f"Begin with this header:\n```python\n{step['function_header']}\n```\n\n"
        f"These imports are there; use nothing else and do not repeat them:\n```python\n"
        f"{problem['required_dependencies']}\n```\nReply with the function, and helpers of its own if it "
        "needs them, in one ```python block: no earlier "
        "steps, no example, no test."
    )


def grade(example: Example, answers: Sequence[str], tools: Tools) -> list[Grade]:
    """One grade a step that was asked."""
    problem = example.extra
    replies = iter(answers)
    code, grades = [problem["required_dependencies"], _COMPARE], []
    for step in problem["sub_steps"]:
        if _given(step):
            code.append(step["ground_truth_code"])
            continue
        own = code_block(next(replies, ""))
        code.append(own)
        grades.append(_run(step, own, "\n\n".join(code), example, tools))
    return grades


def _run(step: dict[str, Any], own: str, code: str, example: Example, tools: Tools) -> Grade:
    if not own.strip():
        return Grade(False, None, f"step {step['step_number']}: no code block")
    files, reader = _target_file(step, example, tools)
    tests = [f"target = _all[{i}]\n{test}" for i, test in enumerate(step["test_cases"])]
    program = "\n".join([code, reader, "_all = _targets()", *tests, "print('every test passed')"])
    outcome = tools.sandbox.run(program, files=files, limits=LIMITS)
    if outcome.ok and outcome.stdout.rstrip().endswith("every test passed"):
        return Grade(True, own)
    why = f"stopped: {outcome.stopped}" if outcome.stopped else outcome.stderr.strip().split("\n")[-1][:200]
    return Grade(False, own, f"step {step['step_number']}: {why}")


def _target_file(step: dict[str, Any], example: Example, tools: Tools) -> tuple[dict[str, bytes], str]:
    """The step's targets as a file for the sandbox, and the code that reads it there."""
    known = example.gold
    if isinstance(known, Path):
        return {"targets.h5": _cut(known, step["step_number"])}, _READ_H5
    if step["step_number"] not in known:
        known[step["step_number"]] = _computed(step, example.extra, tools)
    return {"targets.pickle": known[step["step_number"]]}, _READ_PICKLE


def _cut(path: Path, step: str) -> bytes:
    import io

    import h5py

    held = io.BytesIO()
    with h5py.File(path) as source, h5py.File(held, "w") as part:
        if step not in source:
            raise ValueError(f"{path} has no targets of step {step}; is it SciCode's {TARGETS}?")
        for name in source[step]:
            source.copy(source[f"{step}/{name}"], part, name)
    return held.getvalue()


def _computed(step: dict[str, Any], problem: dict[str, Any], tools: Tools) -> bytes:
    """A development step's targets, pickled: what its tests compare with `target`, computed by the reference code."""
    code = [problem["required_dependencies"], _COMPARE]
    for other in problem["sub_steps"]:
        code.append(other["ground_truth_code"])
        if other is step:
            break
    code.append("_all = []")
    for test in step["test_cases"]:
        code.append(_recording(test))
    code.append("import base64, pickle\nprint('\\n' + base64.b64encode(pickle.dumps(_all)).decode())")
    outcome = tools.sandbox.run("\n".join(code), limits=Limits(seconds=600, memory=8 << 30, output_bytes=64 << 20))
    if not outcome.ok:
        raise ValueError(
            f"the reference code of SciCode step {step['step_number']} does not run here: "
            f"{outcome.stopped or outcome.stderr.strip().split(chr(10))[-1]}"
        )
    return base64.b64decode(outcome.stdout.strip().split("\n")[-1])


def _recording(test: str) -> str:
    """The test with its assertion on `target` replaced by a note of what is compared with it."""
    tree = ast.parse(test)
    for index, statement in enumerate(tree.body):
        if isinstance(statement, ast.Assert) and (value := _beside_target(statement.test)) is not None:
            tree.body[index] = ast.parse(f"_all.append({value})").body[0]
            return "\n".join(ast.unparse(s) for s in tree.body[: index + 1])
    raise ValueError(f"a SciCode test compares nothing with `target`: {test[:80]!r}")


def _beside_target(expression: ast.expr) -> str | None:
    """What is compared with `target`, as code; where it is compared entry by entry, a dictionary of the entries."""
    entries: dict[str, str] = {}
    for node in ast.walk(expression):
        beside = []
        if isinstance(node, ast.Call):
            beside = node.args
        elif isinstance(node, ast.Compare):
            beside = [node.left, *node.comparators]
        elif isinstance(node, ast.BinOp):
            beside = [node.left, node.right]
        others = [x for x in beside if not _is_target(x) and not (isinstance(x, ast.Subscript) and _is_target(x.value))]
        for part in beside:
            if _is_target(part) and others:
                return ast.unparse(others[0])
            if isinstance(part, ast.Subscript) and _is_target(part.value) and others:
                entries.setdefault(ast.unparse(part.slice), ast.unparse(others[0]))
    return "{" + ", ".join(f"{key}: {value}" for key, value in entries.items()) + "}" if entries else None


def _is_target(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "target"


def _examples(rows: Iterable[dict[str, Any]]) -> list[Example]:
    """Problems with reference code compute their targets; the others need the authors' file beside the data."""
    found = []
    for row in rows:
        reference = all(step.get("ground_truth_code") for step in row["sub_steps"])
        gold: Any = {}
        if not reference:
            if not row.get("_folder"):
                raise ValueError(
                    f"SciCode problem {row['problem_id']} needs the authors' {TARGETS}: put it beside the problems "
                    "file and name that file with --data"
                )
            gold = Path(row["_folder"]) / TARGETS
        extra = {name: row[name] for name in ("problem_description_main", "required_dependencies", "sub_steps")}
        found.append(Example(str(row["problem_id"]), json.dumps(extra["problem_description_main"]), gold, extra))
    return found


TASK = Task(
    name="scicode",
    title="SciCode",
    citation="arXiv 2407.13168",
    licence="Apache-2.0",
    source=Source("SciCode1/SciCode"),
    examples=_examples,
    converse=converse,
    grade=grade,
    settings=Settings(repeats=3),
    card=(40.0, 40.1),
)
