"""benchmarks/step_profile.py: what a step's time is attributed to."""

from benchmarks.step_profile import attribute, kind_of


def test_kernels_are_told_apart():
    names = {
        "exchange": "exchanges",
        "sum_norm": "exchanges",
        "ncclDevKernel_AllGather_RING_LL": "exchanges",
        "nvfp4_experts_down": "routed experts",
        "nvfp4_linear": "NVFP4 linears",
        "nvjet_tst_64x8_64x16_4x1_v_bz_TNT": "BF16 linears",
        "dense_linear": "BF16 linears",
        "mla_decode": "attention",
        "route": "router",
        "void at::native::vectorized_elementwise_kernel<4>": "the rest",
    }
    assert {name: kind_of(name) for name in names} == names


def test_overlapping_kernels_are_counted_once():
    """The second begins while the first runs, and waits for it; then nothing runs."""
    kernels = [(0.0, 1000.0, "sum_norm"), (400.0, 1500.0, "route"), (2000.0, 2500.0, "sum_norm")]
    assert attribute(kernels) == {"exchanges": 1.5, "router": 0.5, "nothing": 0.5}
