import pytest

from deepseek_fp4_plugin.kernels import cpu


@pytest.fixture(params=cpu.paths())
def path(request):
    """Each instruction-set path of the CPU kernels in turn."""
    with cpu.use_path(request.param):
        yield request.param
