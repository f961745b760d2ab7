"""CUDA C++ compiled by NVRTC at first use, and kept on disk.

No header beside our own is included, so that the compiler library alone is enough: nothing is built at install and no
CUDA toolkit is asked for. A cubin is kept under the name of everything it depends on: source, options, compiler.
"""

import functools
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

nvrtc: Any
try:
    from cuda.bindings import nvrtc  # type: ignore[no-redef]
except ImportError:
    nvrtc = None

SOURCES = Path(__file__).with_name("source")


@functools.cache
def available() -> bool:
    """Whether the compiler is installed: the bindings, and the library behind them."""
    try:
        return nvrtc is not None and bool(_checked(nvrtc.nvrtcVersion()))
    except RuntimeError:
        return False


def cache_folder() -> Path:
    """Where compiled kernels are kept: the platform's place for what can be made again."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "deepseek_fp4_plugin" / "cuda"


def cubin(file: str, defines: tuple[tuple[str, int], ...], architecture: str, cache: Path | None = None) -> bytes:
    """The machine code of source/`file` for `architecture` ("sm_90a"), from the cache or compiled now.

    defines: names and values of preprocessor macros.  cache: another folder than `cache_folder()`.
    Raises RuntimeError with the compiler's log.
    """
    text = (SOURCES / file).read_text(encoding="utf-8")
    headers = {path.name: path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.cuh"))}
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "-default-device", "-lineinfo"]
    options += [f"-D{name}={value}" for name, value in defines]
    version = _checked(nvrtc.nvrtcVersion())
    key = hashlib.sha256(repr((text, headers, options, version)).encode()).hexdigest()[:32]
    path = (cache or cache_folder()) / f"{Path(file).stem}-{architecture}-{key}.cubin"
    if path.is_file():
        return path.read_bytes()
    code, _ = _compile(text, file, headers, options)
    _keep(path, code)
    return code


def _compile(text: str, name: str, headers: dict[str, str], options: list[str]) -> tuple[bytes, str]:
    """Machine code, and what the compiler says about it."""
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            text.encode(),
            name.encode(),
            len(headers),
            [header.encode() for header in headers.values()],
            [header.encode() for header in headers],
        )
    )
    try:
        result = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        # The bindings write into bytes, of which CPython keeps a single copy each where they are one byte long.
        buffer = b" " * (1 + _checked(nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc.nvrtcGetProgramLog(program, buffer))
        log = buffer.rstrip(b" \0").decode()
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{name} does not compile with {' '.join(options)}:\n{log}")
        code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
        return code, log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _keep(path: Path, code: bytes) -> None:
    """Written aside and renamed, so that nobody reads half a file; a folder that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)
    except OSError:
        return


def _checked(result: tuple) -> Any:
    if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC: {result[0].name}")
    return result[1] if len(result) == 2 else result[1:]
