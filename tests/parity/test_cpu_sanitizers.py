"""The kernel tests once more on an extension built with the address and undefined-behaviour sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = """
import importlib.util, sys, pytest
name = "deepseek_fp4_plugin.kernels.cpu._native"
spec = importlib.util.spec_from_file_location(name, sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules[name] = module
from deepseek_fp4_plugin.kernels.cpu.extension import native
assert native is module
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[2]]))
"""


@pytest.mark.proof
def test_kernel_tests_under_sanitizers(tmp_path):
    nanobind = pytest.importorskip("nanobind", reason="pip install nanobind to build the extension by hand")
    compiler = shutil.which("g++")
    if not (compiler and shutil.which("cmake")):
        pytest.skip("needs g++ and cmake")
    configure = [
        "cmake",
        "-S",
        ROOT / "native",
        "-B",
        tmp_path,
        "-DSANITIZE=address,undefined",
        f"-Dnanobind_DIR={nanobind.cmake_dir()}",
    ]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CXX_COMPILER={compiler}"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path, "-j2"], check=True, capture_output=True)
    library = next(tmp_path.glob("_native*.so"))
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    # Python and torch are not built with the sanitizers: their leaks and their C++ exceptions are not ours.
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join([*found, str(Path(found[0]).with_name("libstdc++.so"))]),
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    tests = ROOT / "tests" / "parity" / "test_cpu_kernels.py"
    command = [sys.executable, "-c", RUN, library, tests]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-5000:]
    assert "ERROR: AddressSanitizer" not in output and "runtime error:" not in output, output[-5000:]
