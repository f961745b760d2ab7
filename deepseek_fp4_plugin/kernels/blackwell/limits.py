"""What the FP4 tensor cores do not serve; and no device before a trial there has given the reference's results."""

import functools
import importlib.util
import os
import subprocess
import sys

import torch

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels.weights import Case

NOT_INSTALLED = "Triton is not installed; torch's CUDA builds for Linux bring it"
RIGHT = "right"  # what a trial says of itself, or else what is wrong
_PROGRAM = "import sys; from deepseek_fp4_plugin.kernels.blackwell.trial import outcome; print(outcome(sys.argv[1]))"
_SECONDS = 300  # it takes a few


@functools.cache
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def refuses(case: Case) -> str | None:
    """Why a case is not served, or None."""
    if case.device.type != "cuda" or not torch.cuda.is_available():
        return "it is for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(case.device)
    if capability[0] != 10:
        return f"it is for compute capability 10.0, not {capability[0]}.{capability[1]}"
    if not available():
        return NOT_INSTALLED
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "Triton would interpret it (TRITON_INTERPRET), not run it on the GPU"
    if case.format is not WeightFormat.NVFP4 or case.activations != "fp4" or case.dtype is not torch.bfloat16:
        return "it is for NVFP4 weights and FP4 activations of a BF16 model"
    index = torch.cuda.current_device() if case.device.index is None else case.device.index
    return failure(f"cuda:{index}")


@functools.cache
def failure(device: str) -> str | None:
    """What was wrong when the kernel was tried on a device, or None.

    A trial is a process of its own: a kernel at which the GPU stops, that hangs, or whose compiler aborts would take
    this one with it.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)  # the compiled kernel is tried
    try:
        trial = subprocess.run(
            [sys.executable, "-c", _PROGRAM, device],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"its trial on {device} did not end in {_SECONDS} s"
    except OSError as error:
        return f"its trial on {device} did not start: {error}"
    said = trial.stdout.strip().rpartition("\n")[2]
    if trial.returncode == 0 and said == RIGHT:
        return None
    if said in ("", RIGHT):
        last = trial.stderr.strip().rpartition("\n")[2].strip()
        said = f"it ended with status {trial.returncode}" + (f": {last}" if last else "")
    return f"its trial on {device} failed: {said}"
