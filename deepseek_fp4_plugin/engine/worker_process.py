"""A worker in a process of its own: it connects to the other ranks, loads its slice, and computes the plans that come.

The front talks to it over two connections (multiprocessing's: lengths and pickles): one for work, one for the
heartbeat. `serve_rank` is the worker's whole life; whoever started the process only brings the two connections.
"""

import functools
import logging
import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch

from deepseek_fp4_plugin import __version__
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.config import EngineConfig
from deepseek_fp4_plugin.engine.door import hang_up, own_address
from deepseek_fp4_plugin.engine.executor import Runner
from deepseek_fp4_plugin.engine.heartbeat import Pulse
from deepseek_fp4_plugin.engine.worker import Worker
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.parallel.collectives import Group, ProcessGroup, connect
from deepseek_fp4_plugin.parallel.mesh import Mesh
from deepseek_fp4_plugin.parallel.peers import join
from deepseek_fp4_plugin.parallel.placement import ExpertPlacement, read_load

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assignment:
    """What a worker must know to become a rank.

    ranks_here: ranks that share this machine's memory and cores.  answers: its results are wanted.
    store: host and port where the ranks find each other.
    """

    rank: int
    ranks_here: int
    model: str | Path
    config: EngineConfig
    device: str
    store: tuple[str, int]
    answers: bool
    version: str = __version__


@dataclass(frozen=True)
class Advance:
    """Progress of rank 0; see worker.Progress."""

    what: str
    done: int
    parts: int


@dataclass(frozen=True)
class Question:
    """Why the logits of a request with these tokens are not finite; all ranks look together."""

    token_ids: list[int]


def serve_rank(work: Connection, beat: Connection, patience: float | None) -> None:
    """Be one rank until the front closes `work`. Errors are told to the front, which then ends this process."""
    pulse = Pulse(beat, patience)
    try:
        _serve(work)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the front has closed the group
        pulse.rest()
    except BaseException as error:
        if not isinstance(error, ValueError):
            logger.exception("this rank has failed")
        pulse.fail(_last_words(error))


def _serve(work: Connection) -> None:
    assignment: Assignment = work.recv()
    if assignment.version != __version__:
        raise ValueError(
            f"rank {assignment.rank} runs version {__version__} and the front {assignment.version}; "
            "install the same on every machine"
        )
    rank = assignment.rank
    _speak_on(own_address(work))

    def progress(what: str, done: int, parts: int) -> None:
        if rank == 0:
            work.send(Advance(what, done, parts))

    config = assignment.config
    device = torch.device(assignment.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model = DeepseekV3ForCausalLM.from_pretrained(
        assignment.model,
        dtype=config.dtype,
        device=device,
        nvfp4_activations=config.nvfp4_activations,
        mesh=_mesh(assignment, device),
        progress=functools.partial(progress, "loading"),
        load_format=config.load_format,
    )
    worker = Worker(config, model, assignment.ranks_here, progress)
    work.send(worker.facts)
    work.send(worker.allocate(work.recv()))
    compute(work, worker.runner, assignment.answers, worker.facts.asynchronous)


def compute(work: Connection, runner: Runner, answers: bool, asynchronous: bool) -> None:
    """Start the steps that come, and send their results in the same order, until the front closes `work`.

    asynchronous: a thread waits for the results, so that a step is started while the one before it is computed.
    """
    pending: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
    failures: list[BaseException] = []

    def answer(result: Callable[[], object]) -> None:
        value = result()
        if answers:
            work.send(value)

    def answer_all() -> None:
        try:
            while (result := pending.get()) is not None:
                answer(result)
        except BaseException as failure:
            failures.append(failure)
            hang_up(work)  # the thread that reads it learns of it so

    thread = threading.Thread(target=answer_all, name="results", daemon=True)
    if asynchronous:
        thread.start()
    try:
        while True:
            asked = work.recv()
            if isinstance(asked, Question):
                result: Callable[[], object] = functools.partial(_explain, runner, asked)
            else:
                runner.submit(asked)
                result = runner.collect
            if asynchronous:
                pending.put(result)
            else:
                answer(result)
    except (EOFError, OSError):
        if failures:
            raise failures[0] from None
        raise
    finally:
        pending.put(None)


def _mesh(assignment: Assignment, device: torch.device) -> Mesh:
    """This rank's place, connected to the others."""
    host, port = assignment.store
    store = torch.distributed.TCPStore(host, port, is_master=False)
    config = assignment.config
    return Mesh(
        assignment.rank,
        config.tensor_parallel_size,
        config.moe_expert_parallel_size,
        config.moe_tensor_parallel_size,
        config.enable_attention_dp,
        placement=_placement(config),
        group=_group(assignment.rank, config.tensor_parallel_size, store, device),
    )


def _group(rank: int, size: int, store: torch.distributed.Store, device: torch.device) -> Group:
    if device.type == "cpu":
        return connect(rank, size, store)
    group = connect(rank, size, store, "nccl")
    return join(group, device) if isinstance(group, ProcessGroup) else group


def _placement(config: EngineConfig) -> ExpertPlacement | None:
    """Every rank computes the same from the same file."""
    balancer, ranks = config.moe_config.load_balancer, config.expert_ranks
    if balancer is None or ranks == 1:
        return None
    return ExpertPlacement.balanced(read_load(balancer.load_file), ranks, balancer.num_slots)


def _speak_on(address: str) -> None:
    """Let gloo use the network that the front is on; it would take the one that the machine's name stands for."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(own.address == address for own in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _explain(runner: Runner, question: Question) -> str | RuntimeError:
    """A fault of the explanation must not end the rank."""
    try:
        return runner.explain(question.token_ids)
    except Exception as error:
        return RuntimeError(_line(error))


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _last_words(error: BaseException) -> bytes:
    """A user's mistake as it is, another error as one line: its traceback is in this process's log."""
    if isinstance(error, ValueError):
        kind = CheckpointError if isinstance(error, CheckpointError) else ValueError
        return pickle.dumps(kind(str(error)))
    return pickle.dumps(_line(error))


def main() -> None:
    """The program of a spawned worker. Arguments: the file descriptors of its two connections."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front's affair; it closes the group
    logging.basicConfig(format="%(levelname)s %(name)s (process %(process)d): %(message)s", level=logging.ERROR)
    work, beat = (Connection(int(descriptor)) for descriptor in sys.argv[1:3])
    serve_rank(work, beat, None)
    os._exit(0)  # nothing here outlives the group, and a library's thread must not keep the process
