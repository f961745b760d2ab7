"""The server process: load, say what was loaded, listen, drain on SIGTERM."""

import asyncio
import contextlib
import dataclasses
import gc
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import psutil
import uvicorn

from deepseek_fp4_plugin.config import EngineConfig
from deepseek_fp4_plugin.llm import LLM, Progress
from deepseek_fp4_plugin.serving.app import create_app
from deepseek_fp4_plugin.serving.aside import take_short_turns
from deepseek_fp4_plugin.serving.connection import limited_connection
from deepseek_fp4_plugin.serving.options import ServerOptions
from deepseek_fp4_plugin.serving.restart import Restarter
from deepseek_fp4_plugin.serving.service import Service

logger = logging.getLogger(__name__)


# A second, of all streams together: 64 get one every 26 ms at the most. Each takes some 40 us from the engine.
_PIECES = 2500.0
_LAST_WORDS = 2.0  # seconds for clients to take what a cancelled answer says


Stages = Callable[[], AbstractContextManager[Progress]]  # shows how far loading and warming up are


def serve(model: str, config: EngineConfig, options: ServerOptions, stages: Stages) -> int:
    """Load `model`, warm it up and serve it until SIGTERM or SIGINT; the exit status.

    The port is taken before the model is loaded, so that a port in use costs seconds and not a load. Raises ValueError
    and OSError with a clear sentence for what cannot be served.
    """
    _configure_logging(options.log_level)
    take_short_turns()
    listener = _listen(options)
    try:
        began = time.perf_counter()
        with stages() as progress:
            llm = LLM(model, config=config, progress=progress)
        if "stream_interval" not in config.model_fields_set:
            llm.limit_pieces(_PIECES)
        try:
            app = create_app(llm, options, model, own_reader=True)
            _report(app.state.service, options, time.perf_counter() - began)
            gc.collect()
            gc.freeze()  # what was loaded stays: a collection that goes through all of it stops everything for 0.1 s
            with contextlib.ExitStack() as stack:
                stack.callback(app.state.close)
                if options.restart_on_failure:
                    stack.callback(Restarter(llm).stop)
                return _run(app, listener, options)
        finally:
            llm.shutdown()
    finally:
        listener.close()


class _Server(uvicorn.Server):
    """Tells the service at the first signal, so that requests on open connections are refused while it drains."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_timeout: float, address: str) -> None:
        super().__init__(config)
        self.service, self.drain_timeout, self.address = service, drain_timeout, address
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        logger.info("ready on http://%s", self.address)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            running = self.service.admission.sequences
            logger.info("%s: draining, %d answers under way", signal.Signals(sig).name, running)
            self.service.admission.draining = True
        elif sig == signal.SIGINT and self._loop is not None:  # asked twice at the keyboard
            self._loop.call_soon_threadsafe(self._hurry)
        # uvicorn's own would raise the signal again afterwards; a drained server ends with status 0.
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        deadline = asyncio.get_running_loop().call_later(self.drain_timeout, self._give_up)
        try:
            await super().shutdown(sockets)
        finally:
            deadline.cancel()

    def _give_up(self, why: str = "drain_timeout passed") -> None:
        logger.warning("%s: cancelling %d answers", why, self.service.admission.sequences)
        self.service.admission.abort_all()

    def _hurry(self) -> None:
        """Cancel the answers now; soon after, stop waiting for clients that do not read that."""
        self._give_up("asked again")
        asyncio.get_running_loop().call_later(_LAST_WORDS, setattr, self, "force_exit", True)


def _run(app: Any, listener: socket.socket, options: ServerOptions) -> int:
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        # Behind drain_timeout, when the aborted answers have had their last words.
        timeout_graceful_shutdown=int(options.drain_timeout) + 5,
        http=limited_connection(options.body_timeout),
        ws="none",
    )
    server = _Server(config, app.state.service, options.drain_timeout, _address(options.host, listener))
    server.run(sockets=[listener])
    return 0 if server.started else 1


def _address(host: str, listener: socket.socket) -> str:
    """host:port as a URL has it: the port that was taken, an IPv6 address in brackets."""
    return f"{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def _listen(options: ServerOptions) -> socket.socket:
    """The bound socket. Raises ValueError when the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # The kernel closes connections whose reader stalls, which ends their requests.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(options.stall_timeout * 1000))
        listener.bind(address)
        listener.listen(2048)
        listener.setblocking(False)
    except (OSError, UnicodeError) as error:
        reason = "it is no host name" if isinstance(error, UnicodeError) else error.strerror or error
        raise ValueError(
            f"cannot listen on {options.host}:{options.port}: {reason}; choose another --host or --port"
        ) from None
    return listener


def _configure_logging(level: str) -> None:
    """Messages to standard error; access lines are JSON and stand alone on theirs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    access = logging.StreamHandler(sys.stderr)
    access.setFormatter(logging.Formatter("%(message)s"))
    for name, chosen, least in (
        ("deepseek_fp4_plugin", handler, level.upper()),
        ("deepseek_fp4_plugin.access", access, "INFO"),
        ("uvicorn", handler, "WARNING"),
    ):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [chosen], False
        log.setLevel(least)


def _report(service: Service, options: ServerOptions, seconds: float) -> None:
    """Print the effective configuration, what loading took, and where memory went; keys are counted, not shown."""
    shown = dataclasses.asdict(options) | {"api_keys": f"{len(options.api_keys)} keys"}
    if options.chat_template is not None:
        shown["chat_template"] = f"{len(options.chat_template)} characters"
    config = service.llm.config.model_dump(mode="json")
    if "max_new_tokens" not in service.llm.config.model_fields_set:
        config["max_new_tokens"] = None  # the default is the Python API's; a server's answers may fill the context
    print("engine configuration:", json.dumps(config))
    print("server options:", json.dumps(shown, default=str))
    print(f"sampling defaults: temperature {service.defaults.temperature}, top_p {service.defaults.top_p}, "
          f"top_k {service.defaults.top_k} ({options.sampling_defaults})")  # fmt: skip
    print(f"served as: {', '.join(service.names)} (context of {service.max_model_len} tokens)")
    for line in service.llm.kernels:
        print(f"kernels: {line}")
    memory = ", ".join(f"{name} {_size(size)}" for name, size in service.llm.memory_use().items())
    process = psutil.Process(os.getpid()).memory_info().rss
    warmed = service.llm.warm_up
    steps = f", {warmed.seconds:.1f} s of it warming up ({warmed.recordings} steps recorded)" if warmed else ""
    print(f"loaded in {seconds:.1f} s{steps}; memory: {memory}, process {_size(process)}", flush=True)


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
