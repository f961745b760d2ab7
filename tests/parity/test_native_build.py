"""The C++ itself: headers by themselves, the pool under the thread sanitizer, the kernels under the others."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.native_build import NATIVE, ask, build_extension

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{name}" for name in ("f", "bw", "vl", "dq", "vnni", "vbmi", "bf16"))]
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unused-function", "-Wno-ignored-attributes"]


def test_every_header_compiles_by_itself_and_in_any_order(compiler):
    """By itself twice, so that its guard holds; all of an instruction set's in both orders of the alphabet."""
    headers = sorted(path.name for path in NATIVE.glob("*.h") if path.name != "isa.h")  # isa.h makes a unit
    generic = [name for name in headers if "avx" not in name]
    avx2 = [name for name in headers if "avx512" not in name and name != "few_rows_generic.h"]
    avx512 = [name for name in headers if "avx2" not in name and name not in ("few_rows_generic.h", "panels_generic.h")]
    assert {*generic, *avx2, *avx512} == set(headers)
    cases = [([name, name], AVX512 if name in avx512 else AVX2) for name in headers]
    cases += [
        (names[::way], flags) for names, flags in ((generic, []), (avx2, AVX2), (avx512, AVX512)) for way in (1, -1)
    ]
    failures = []

    def check(case: tuple[list[str], list[str]]) -> None:
        names, flags = case
        source = "".join(f'#include "{name}"\n' for name in names)
        command = [compiler, *FLAGS, *flags, "-DISA=alone", f"-I{NATIVE}", "-fsyntax-only", "-x", "c++", "-"]
        result = subprocess.run(command, input=source, capture_output=True, text=True)
        if result.returncode:
            failures.append(f"{names} {flags}: {result.stderr[:500]}")

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(check, cases))
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    ("sanitizer", "options"),
    [
        ("thread", "halt_on_error=1:allocator_may_return_null=1"),
        ("address,undefined", "allocator_may_return_null=1"),
    ],
)
def test_the_pool_holds(compiler, tmp_path, sanitizer, options):
    _stress(compiler, tmp_path, sanitizer, options, rounds=100)


@pytest.mark.proof
def test_the_pool_holds_for_long(compiler, tmp_path):
    _stress(compiler, tmp_path, "thread", "halt_on_error=1:allocator_may_return_null=1", rounds=20_000)


def _stress(compiler: str, folder: Path, sanitizer: str, options: str, rounds: int) -> None:
    program = folder / "pool_stress"
    sources = [NATIVE / "pool.cpp", NATIVE / "tests" / "pool_stress.cpp"]
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-pthread", *sources, "-o", program],
        check=True,
    )
    arguments = [str(rounds)] if sanitizer == "thread" else [str(rounds), "fork"]  # it does not follow a fork's threads
    environment = {**os.environ, "TSAN_OPTIONS": options, "ASAN_OPTIONS": options, "UBSAN_OPTIONS": "halt_on_error=1"}
    result = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "the pool held\n"), (result.stdout + result.stderr)[-5000:]


@pytest.mark.proof
def test_kernels_without_python(compiler, tmp_path):
    """The check that processors without a Python at hand run."""
    assert _kernels_check([compiler], [], tmp_path, [NATIVE / "avx2.cpp"]) == "portable holds\navx2 holds\n"


@pytest.mark.proof
def test_kernels_on_an_emulated_arm_processor(tmp_path):
    cross, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not (cross and emulator):
        pytest.skip("needs a cross compiler and an emulator: apt-get install g++-aarch64-linux-gnu qemu-user")
    assert _kernels_check([cross, "-static"], [emulator], tmp_path, []) == "portable holds\n"


def _kernels_check(compiler: list[str], emulator: list[str], folder: Path, units: list[Path]) -> str:
    objects = []
    for unit in units:
        objects.append(folder / f"{unit.stem}.o")
        subprocess.run([*compiler, *FLAGS, "-O2", *AVX2, "-c", unit, "-o", objects[-1]], check=True)
    sources = [NATIVE / "tests" / "kernels_check.cpp", NATIVE / "portable.cpp", NATIVE / "pool.cpp"]
    defined = ["-DWITH_AVX2"] if units else []
    program = folder / "kernels_check"
    flags = [*FLAGS, "-O2", "-ffp-contract=off", "-pthread", *defined]
    subprocess.run([*compiler, *flags, *sources, *objects, "-o", program], check=True)
    return subprocess.run([*emulator, program], check=True, capture_output=True, text=True).stdout


TESTS = [
    ROOT / "tests" / "parity" / name
    for name in ("test_cpu_kernels.py", "test_cpu_small_kernels.py", "test_cpu_boundary.py")
]


def test_kernels_under_the_address_and_undefined_sanitizers(compiler, tmp_path):
    """The units that every x86 machine runs; the AVX-512 one takes minutes to compile and is a proof."""
    _kernel_tests(compiler, tmp_path, ["-DAVX512=OFF"])


@pytest.mark.proof
def test_all_kernels_under_the_address_and_undefined_sanitizers(compiler, tmp_path):
    _kernel_tests(compiler, tmp_path, [])


def _kernel_tests(compiler: str, folder: Path, options: list[str]) -> None:
    library = build_extension(compiler, folder, ["-DSANITIZE=address,undefined", *options])
    runtimes = [ask(compiler, f"-print-file-name={name}") for name in ("libasan.so", "libubsan.so")]
    # Python and torch are not built with the sanitizers: their leaks and their C++ exceptions are not ours.
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join([*runtimes, ask(compiler, "-print-file-name=libstdc++.so")]),
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    command = [sys.executable, ROOT / "tests" / "native_build.py", library, *TESTS]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-5000:]
    assert "ERROR: AddressSanitizer" not in output and "runtime error:" not in output, output[-5000:]
