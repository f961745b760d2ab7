"""The Dockerfile without Docker: its stages parsed, and their steps run under a folder that stands for the root."""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass
class Stage:
    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)  # instruction, the rest


def stages() -> list[Stage]:
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text())
    found: list[Stage] = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            base, *name = rest.split(" AS ")
            found.append(Stage(base, name[0] if name else ""))
        else:
            found[-1].steps.append((word, rest))
    return found


class Builder:
    """Runs stages under `folder`, each with a virtual environment in place of the image's Python.

    What only a real image has is left out by name: apt-get and useradd do nothing. Paths that steps name lie
    under the stage's root. without: programs that the stage must not find, although this machine has them.
    """

    def __init__(self, folder: Path, arguments: dict[str, str]):
        self.folder, self.arguments = folder, arguments
        self.roots: dict[str, Path] = {}

    def run(self, stage: Stage, without: tuple[str, ...] = ()) -> Path:
        root = self.folder / (stage.name or "image")
        self.roots[stage.name] = root
        subprocess.run([sys.executable, "-m", "venv", root / "venv"], check=True)
        self._shims(root, without)
        values, place, absolute = {}, Path("/"), {"/"}
        for word, rest in stage.steps:
            if word == "ARG":
                name, _, default = rest.partition("=")
                values[name] = self.arguments.get(name, default)
            elif word == "WORKDIR":
                place = Path(rest)
                absolute.add(rest)
                self._under(root, place).mkdir(parents=True, exist_ok=True)
            elif word == "COPY":
                absolute |= self._copy(root, place, rest)
            elif word == "RUN":
                absolute |= set(re.findall(r"(?<= )/\w+(?= )", rest))
                for path in absolute - {"/"}:
                    rest = re.sub(rf"(?<![\w/.]){re.escape(path)}(?![\w])", str(self._under(root, Path(path))), rest)
                subprocess.run(
                    ["sh", "-ec", rest], check=True, cwd=self._under(root, place), env=self.environment(root, values)
                )
        return root

    def environment(self, root: Path, values: dict[str, str] | None = None) -> dict[str, str]:
        # Only what the stage installed: no user packages, no path of this checkout.
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        return {**kept, **(values or {}), "PATH": f"{root}/shims:{root}/venv/bin:{os.environ['PATH']}"}

    @staticmethod
    def _under(root: Path, path: Path) -> Path:
        return root / path.relative_to("/")

    def _shims(self, root: Path, without: tuple[str, ...]) -> None:
        (root / "shims").mkdir()
        programs = {name: "exit 0" for name in ("apt-get", "useradd")}
        programs |= {name: f"echo {name} is not in this image >&2; exit 127" for name in without}
        for name, body in programs.items():
            shim = root / "shims" / name
            shim.write_text(f"#!/bin/sh\n{body}\n")
            shim.chmod(shim.stat().st_mode | stat.S_IEXEC)

    def _copy(self, root: Path, place: Path, rest: str) -> set[str]:
        words = shlex.split(rest)
        source = ROOT
        if words[0].startswith("--from="):
            source = self.roots[words.pop(0).removeprefix("--from=")]
        *names, target = words
        to = self._under(root, place / target)
        for name in names:
            path = source / name.lstrip("/")
            if path.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.so")
                shutil.copytree(path, to, dirs_exist_ok=True, ignore=ignored)
            else:
                to.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, to)
        return {target} if target.startswith("/") else set()
