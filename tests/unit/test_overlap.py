"""Reading, computing and writing at once: what happens where memory ends. Order and errors: test_quantize_loop.py."""

import subprocess
import sys

CAPPED = """
import resource
from pathlib import Path
from deepseek_fp4_plugin.quantization.overlap import overlapped

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))

def run():
    return list(overlapped([1, 2], lambda job: job, lambda job, loaded: loaded, lambda job, result: None, int, 10))

soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
stack = min(max(resource.getrlimit(resource.RLIMIT_STACK)[0], 0) or 8 << 20, 64 << 20)
for more in range(stack - (64 << 10), stack + (256 << 10), 4096):
    resource.setrlimit(resource.RLIMIT_DATA, (held() + more, hard))
    try:
        assert not run()
    except MemoryError:
        pass
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
assert run() == [1, 2]
"""


def test_threads_that_find_no_memory_are_an_error_and_not_waited_for():
    """Room for a thread's stack and little beside: Python would wait for one that had ended unseen."""
    result = subprocess.run([sys.executable, "-c", CAPPED], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
