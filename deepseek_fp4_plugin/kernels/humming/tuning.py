"""Which of humming-kernels' kernels multiply by a weight: what it takes itself, but for two things.

Where it cuts the inputs over multiprocessors (stream-K), up to ten parts are rounded to BF16 and added there, three or
more in the order in which they come: about twice the error, and other bits at every call. And before the first
product it compiles all kernels that it has for a shape, 10 to 150 of them, seconds of a core each.
"""

import json
from typing import Any

# One kernel serves up to so many rows, and is tuned for the most; the last one serves all that are more.
ROWS = (8, 64, 512, 4096)
ROWS_OF_EXPERTS = (8, 64, 512, 4096, 65536)  # of all together

GROUPED = {"gemm_type": "grouped_contiguous"}


def kernels(layer: Any) -> str:
    """What a HummingLayer is to be called with: a list of [rows above, rows up to, kernel]."""
    from humming.tune import get_heuristics_config

    kind, borders = (GROUPED, ROWS_OF_EXPERTS) if layer.num_experts else ({}, ROWS)
    chosen = []
    for above, rows in zip((0, *borders), borders, strict=False):
        kernel = get_heuristics_config(layer.humming_config, shape_m=rows, device=layer.locks.device, **kind)
        chosen.append([above, rows, kernel | {"use_stream_k": False}])
    chosen[-1][1] = 1 << 30
    return json.dumps(chosen, default=int)
