"""Other builds of the native extension. Run as a program: tests with such a build in its place."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[1] / "native"


def ask(compiler: str, *arguments: str) -> str:
    return subprocess.run([compiler, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def build_extension(compiler: str, folder: Path, options: list[str]) -> Path:
    """The library, built under `folder` with these options of native/CMakeLists.txt."""
    import nanobind

    configure = ["cmake", "-S", NATIVE, "-B", folder, f"-Dnanobind_DIR={nanobind.cmake_dir()}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CXX_COMPILER={compiler}", *options]
    for command in (configure, ["cmake", "--build", folder, "-j2"]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    return next(folder.glob("_native*.so"))


def main() -> int:
    """Runs pytest on the files behind the library's path; uncaptured, or a sanitizer's last words would be lost."""
    name = "deepseek_fp4_plugin.kernels.cpu._native"
    spec = importlib.util.spec_from_file_location(name, sys.argv[1])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    from deepseek_fp4_plugin.kernels.cpu.extension import native

    assert native is module
    return pytest.main(["-q", "-s", "-p", "no:cacheprovider", *sys.argv[2:]])


if __name__ == "__main__":
    sys.exit(main())
