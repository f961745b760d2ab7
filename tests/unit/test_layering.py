"""The floors of docs/architecture.md: a module imports its own folder and the floors below, nothing else of ours."""

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

PACKAGE = "deepseek_fp4_plugin"
ROOT = Path(__file__).parents[2] / PACKAGE

FLOOR = {
    "numerics": 0, "checkpoint": 0, "settings": 0, "config": 0, "tokenizer": 0, "token_bound": 0, "tiktoken_form": 0,
    "assets": 0,
    "kernels": 1, "parallel": 1,
    "layers": 2,
    "models": 3,
    "quantization": 4, "engine": 4,
    "llm": 5,
    "serving": 6, "evaluation": 6, "doctor": 6, "checkup": 6, "planner": 6,
    "cli": 7,
}  # fmt: skip
# Sideways on one floor: these neighbours lean on each other in one direction.
ALLOWED = {
    ("kernels", "numerics"),
    ("parallel", "kernels"),
    ("checkpoint", "numerics"),
    ("config", "settings"),
    ("tokenizer", "token_bound"),
    ("tokenizer", "tiktoken_form"),
}


def imports(path: Path) -> set[str]:
    """First-level names of our package that a file imports, at any depth; type-checking blocks count too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module] if node.module != PACKAGE else [f"{PACKAGE}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {room(name) for name in names if name.startswith(f"{PACKAGE}.")}
    return found


def room(name: str) -> str:
    """The room of an imported name; a public name of the package (`from ... import LLM`) is its home's."""
    first = name.split(".")[1]
    return import_module(PACKAGE)._HOMES[first].split(".")[1] if first in import_module(PACKAGE)._HOMES else first


def parts(path: Path, names: dict[str, Path], top_only: bool = True) -> set[Path]:
    """The files of our package that a file imports: when it is itself imported, or (not top_only) at any time."""
    found = set()
    for node in _statements(ast.parse(path.read_text(encoding="utf-8")), top_only):
        wanted = []
        if isinstance(node, ast.ImportFrom) and node.module:
            # A module of a folder is not the folder's own file; the native extension is a module too.
            wanted = [f"{node.module}.{alias.name}" for alias in node.names if alias.name != "_native"]
            wanted = [name if name in names else node.module for name in wanted]
        elif isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        found |= {names[name] for name in wanted if name in names}
    return found - {path, names[PACKAGE]}  # the package's own file brings its public names lazily


def _statements(tree: ast.AST, top_only: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        yield node
        if not (top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from _statements(node, top_only)


def circle(imported: dict[Path, set[Path]]) -> list[Path]:
    """Files that import one another in a circle, the first as the last; empty where there is none."""
    done: set[Path] = set()

    def walk(path: Path, trail: list[Path]) -> list[Path]:
        if path in trail:
            return [*trail[trail.index(path) :], path]
        if path in done:
            return []
        for other in sorted(imported[path]):
            if found := walk(other, [*trail, path]):
                return found
        done.add(path)
        return []

    return next((found for path in sorted(imported) if (found := walk(path, []))), [])


def modules() -> list[tuple[str, Path]]:
    out = []
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts != ("__init__",):
            out.append((parts[0], path))
    return out


def violations(found: list[tuple[str, set[str], str]]) -> list[str]:
    wrong = []
    for own, imported, path in found:
        for name in sorted(imported - {own}):
            if name.startswith("__"):
                continue  # the package's version
            below = FLOOR[name] < FLOOR[own] or (own, name) in ALLOWED
            if not below:
                wrong.append(f"{path}: {own} (floor {FLOOR[own]}) imports {name} (floor {FLOOR[name]})")
    return wrong


def test_every_room_has_a_floor():
    assert {name for name, _ in modules()} <= FLOOR.keys()


def test_a_floor_only_knows_the_floors_below():
    assert violations([(own, imports(path), str(path.relative_to(ROOT))) for own, path in modules()]) == []


def test_the_rule_can_be_broken():
    found = [("layers", {"models"}, "x.py"), ("quantization", {"engine"}, "y.py"), ("llm", {"engine"}, "z.py")]
    assert [line[:4] for line in violations(found)] == ["x.py", "y.py"]


def test_no_file_imports_itself_in_a_circle():
    """Not even through an import inside a function, which is how a circle is hidden."""
    paths = {path: path.relative_to(ROOT.parent).with_suffix("").parts for path in ROOT.rglob("*.py")}
    names = {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in paths.items()}
    for top_only in (True, False):
        found = circle({path: parts(path, names, top_only) for path in paths})
        assert found == [], " imports ".join(str(path.relative_to(ROOT)) for path in found)


def test_circles_and_public_names_are_seen(tmp_path):
    a, b, c = (tmp_path / name for name in ("a.py", "b.py", "c.py"))
    a.write_text(f"from {PACKAGE} import b\n")
    b.write_text(f"def f():\n    import {PACKAGE}.c\n")
    c.write_text(f"from {PACKAGE}.a import x\n")
    names = {f"{PACKAGE}.{path.stem}": path for path in (a, b, c)} | {PACKAGE: tmp_path / "__init__.py"}
    assert circle({path: parts(path, names) for path in (a, b, c)}) == []
    assert circle({path: parts(path, names, top_only=False) for path in (a, b, c)}) == [a, b, c, a]
    a.write_text(f"from {PACKAGE} import LLM\n")
    assert imports(a) == {"llm"}


def test_workers_are_the_executors_alone():
    """Ranks, their processes and how they are started are known to the executors; the rest knows plans and results."""
    inside = {"worker.py", "worker_group.py", "worker_process.py", "executor.py", "launch.py", "launch_spawned.py",
              "launch_ray.py", "launch_torchrun.py", "warm_up.py"}  # fmt: skip
    hidden = {f"{PACKAGE}.engine.{name}" for name in ("worker_process", "model_runner", "launch_spawned", "launch_ray",
                                                      "launch_torchrun", "warm_up")}  # fmt: skip
    wrong = []
    for _, path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        if path.name not in inside and named & hidden:
            wrong.append(f"{path.relative_to(ROOT)}: {named & hidden}")
    assert wrong == []


def test_torch_is_not_imported_for_help():
    """`deepseek-fp4 --help` must not wait for torch."""
    import subprocess
    import sys

    code = f"import sys, {PACKAGE}, {PACKAGE}.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
