"""Workers as Ray actors, on as many machines as the cluster has. Needs the extra `ray`.

Ray starts the processes and says where; plans, results and heartbeats go over connections of our own, as they do within
one machine: Ray takes a minute to see a cut link.
"""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from deepseek_fp4_plugin.config import EngineConfig
from deepseek_fp4_plugin.engine.door import Address, Caller, Door, knock
from deepseek_fp4_plugin.engine.executor import WorkerError
from deepseek_fp4_plugin.engine.heartbeat import ORPHANED
from deepseek_fp4_plugin.engine.worker import Progress
from deepseek_fp4_plugin.engine.worker_group import Member, WorkerGroup
from deepseek_fp4_plugin.engine.worker_process import serve_rank

_PLACING = 120.0  # seconds to find room for all ranks in the cluster
_ARRIVING = 300.0  # seconds for their processes to start


class RayWorker:
    """The actor: one rank, until its front closes the group or is gone."""

    def run(self, address: Address, caller: Caller) -> None:
        serve_rank(*knock(address, caller), ORPHANED)


class Actor:
    """An actor of ours, as a group's process."""

    def __init__(self, ray: Any, handle: Any, running: Any, caller: Caller):
        self._ray, self._handle, self._running = ray, handle, running
        self._place = f"process {caller.process} on {caller.machine}"
        self._killed = False

    def __str__(self) -> str:
        return self._place

    def fate(self) -> str:
        return "has ended"

    def kill(self) -> None:
        if not self._killed:
            self._killed = True
            self._ray.kill(self._handle)

    def join(self) -> None:
        if not self._killed:
            self._ray.wait([self._running], timeout=10)
            self.kill()


def start_on_ray(
    config: EngineConfig, model: str | Path, device: torch.device, progress: Progress | None
) -> WorkerGroup:
    """One actor a rank, in a bundle of its own: of the placement group that this code runs in, or of a new one.

    Raises ValueError without Ray, WorkerError when the cluster has no room.
    """
    try:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
    except ImportError:
        raise ValueError(
            "orchestrator_type=ray needs Ray, which is not installed; pip install 'deepseek_fp4_plugin[ray]'"
        ) from None
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING)
    ranks = config.tensor_parallel_size
    need = {"CPU": 1.0} if device.type == "cpu" else {"GPU": 1.0, "CPU": 1.0}
    group, own = _placement(ray, need, ranks)
    table = ray.util.placement_group_table(group)
    bundles = _bundles(table["bundles"], need, ranks)
    # Neighbouring ranks share a machine: they exchange most.
    nodes = table["bundles_to_node_id"]
    bundles.sort(key=lambda bundle: (nodes[bundle], bundle))
    here = Counter(nodes[bundle] for bundle in bundles)
    cores = {node["NodeID"]: int(node["Resources"].get("CPU", 1)) for node in ray.nodes()}
    host = ray.util.get_node_ip_address()
    own_device = "cpu" if device.type == "cpu" else "cuda:0"  # an actor sees its own GPU alone
    actors: list[Any] = []
    running: list[Any] = []

    def look() -> None:
        ended, _ = ray.wait(running, timeout=0)
        if ended:
            try:
                ray.get(ended)
            except Exception as error:
                raise WorkerError(f"a Ray actor could not start: {str(error).strip().splitlines()[0]}") from None

    def release() -> None:
        for actor in actors:
            ray.kill(actor)
        if own:
            ray.util.remove_placement_group(group)

    try:
        with Door(host) as door:
            for rank, bundle in enumerate(bundles):
                node = nodes[bundle]
                actor = ray.remote(RayWorker).options(
                    num_cpus=need["CPU"],
                    num_gpus=need.get("GPU", 0),
                    scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
                    runtime_env={"env_vars": {"OMP_NUM_THREADS": str(max(1, cores.get(node, 1) // here[node]))}},
                )
                actors.append(actor.remote())
                running.append(actors[-1].run.remote(door.address, Caller(rank, own_device, here[node])))
            arrivals = door.arrivals(set(range(ranks)), _ARRIVING, look)
    except BaseException:
        release()
        raise
    members = [
        Member.of(arrival, Actor(ray, actors[rank], running[rank], arrival.caller))
        for rank, arrival in enumerate(arrivals)
    ]
    return WorkerGroup(members, config, model, host, progress, release)


def _placement(ray: Any, need: dict[str, float], ranks: int) -> tuple[Any, bool]:
    """A placement group with room for all ranks, and whether it is ours to remove."""
    outer = ray.util.get_current_placement_group()
    if outer is not None:
        return outer, False
    group = ray.util.placement_group([need] * ranks, strategy="PACK")
    if not group.wait(_PLACING):
        ray.util.remove_placement_group(group)
        what = " and ".join(f"a {name}" for name in need)
        raise WorkerError(
            f"the Ray cluster found no room for {ranks} ranks of {what} each within {_PLACING:.0f} s; "
            "see `ray status`, add machines or lower tensor_parallel_size"
        )
    return group, True


def _bundles(bundles: dict[int, dict[str, float]], need: dict[str, float], ranks: int) -> list[int]:
    """Which bundles the ranks get: the last ones that are large enough; a first one may be their caller's.

    Raises ValueError when there are too few.
    """
    fit = [index for index, has in sorted(bundles.items()) if all(has.get(name, 0) >= n for name, n in need.items())]
    if len(fit) < ranks:
        raise ValueError(
            f"tensor_parallel_size={ranks} needs a bundle for each rank, and the placement group around this process "
            f"has {len(fit)} with {', '.join(f'{n:g} {name}' for name, n in need.items())}"
        )
    return fit[len(fit) - ranks :]
