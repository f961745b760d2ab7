"""Several ranks: how they wait for each other, and which sizes fit together."""

from typing import Annotated

from pydantic import Field

from deepseek_fp4_plugin.settings.choices import Bool, Choices, Int, refuse


class AttentionDpConfig(Choices):
    """Waiting of attention-data-parallel ranks for each other; times in engine iterations."""

    enable_balance: Bool = False
    timeout_iters: Annotated[Int, Field(ge=0)] = 50
    batching_wait_iters: Annotated[Int, Field(ge=0)] = 10


def check_sizes(ranks: int, expert_parallel: int | None, expert_tensor_parallel: int | None) -> None:
    """Raises ValueError for experts that cannot be spread over the ranks so."""
    pair = {"moe_expert_parallel_size": expert_parallel, "moe_tensor_parallel_size": expert_tensor_parallel}
    for name, size in pair.items():
        if size and ranks % size:
            refuse(
                f"EngineConfig: {name}={size} does not divide tensor_parallel_size={ranks}; "
                "the experts are spread over the same ranks"
            )
    if expert_parallel and expert_tensor_parallel and expert_parallel * expert_tensor_parallel != ranks:
        refuse(
            f"EngineConfig: moe_expert_parallel_size={expert_parallel} times "
            f"moe_tensor_parallel_size={expert_tensor_parallel} is not tensor_parallel_size={ranks}; leave one out"
        )
