"""The floors of docs/architecture.md: a module imports its own folder and the floors below, nothing else of ours."""

import ast
from pathlib import Path

PACKAGE = "deepseek_fp4_plugin"
ROOT = Path(__file__).parents[2] / PACKAGE

FLOOR = {
    "numerics": 0, "checkpoint": 0, "settings": 0, "config": 0, "tokenizer": 0, "assets": 0,
    "kernels": 1, "parallel": 1,
    "layers": 2,
    "models": 3,
    "quantization": 4, "engine": 4,
    "llm": 5,
    "serving": 6, "evaluation": 6, "doctor": 6,
    "cli": 7,
}  # fmt: skip
# Sideways on one floor: these neighbours lean on each other in one direction.
ALLOWED = {("kernels", "numerics"), ("checkpoint", "numerics"), ("config", "settings")}


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
        found |= {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}.")}
    return found


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
            if name.startswith("__") or name[0].isupper():
                continue  # the package's version or its public names, which __init__ resolves lazily
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


def test_torch_is_not_imported_for_help():
    """`deepseek-fp4 --help` must not wait for torch."""
    import subprocess
    import sys

    code = f"import sys, {PACKAGE}, {PACKAGE}.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
