"""A real server process for tests: `deepseek-fp4 serve` on a free port, its log kept."""

import contextlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

R1_NANO = Path(__file__).parents[2] / "deepseek_fp4_plugin" / "assets" / "r1_nano"


# Programs for `running_server` whose engine is as slow as a test needs it to be, on any machine.
_BEFORE_A_STEP = """
import pathlib, time
from deepseek_fp4_plugin.engine import engine
step = engine.LLMEngine.step
def slowed(self):
    {wait}
    return step(self)
engine.LLMEngine.step = slowed
from deepseek_fp4_plugin.cli import main
main()
"""
TEN_STEPS_A_SECOND = _BEFORE_A_STEP.format(wait="time.sleep(0.1)")
HELD = _BEFORE_A_STEP.format(wait='while pathlib.Path("hold").exists(): time.sleep(0.01)')  # in the server's folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Server:
    """A running server. `name` is the model's name in requests."""

    process: subprocess.Popen
    port: int
    log_path: Path
    name: str
    seconds: float  # from the start of the process to the first 200 of /health

    @staticmethod
    def program() -> list[str]:
        return [sys.executable, "-c", "from deepseek_fp4_plugin.cli import main; main()"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def client(self, **kwargs) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **kwargs)

    def chat(self, content: str = "What is 2 + 3?", **fields) -> httpx.Response:
        body = {"model": self.name, "messages": [{"role": "user", "content": content}], "max_tokens": 16, **fields}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60)

    def complete(self, prompt="abc", **fields) -> httpx.Response:
        body = {"model": self.name, "prompt": prompt, "max_tokens": 8, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def wait_idle(self, seconds: float = 20) -> dict[str, float]:
        """The gauges once nothing runs, waits or holds cache blocks."""
        deadline = time.monotonic() + seconds
        while True:
            gauges = self.gauges()
            busy = [gauges[f"deepseek_fp4_{n}"] for n in ("num_requests_running", "num_requests_waiting",
                                                          "requests_active")]  # fmt: skip
            if not any(busy):
                return gauges
            assert time.monotonic() < deadline, f"still busy: {gauges}"
            time.sleep(0.05)

    def wait_for_line(self, text: str, seconds: float = 20) -> str:
        """The first line of the log with that text: a request's is written behind its answer."""
        deadline = time.monotonic() + seconds
        while True:
            for line in self.log.splitlines(keepends=True):
                if text in line and line.endswith("\n"):
                    return line
            assert time.monotonic() < deadline, f"no line of the log has {text}"
            time.sleep(0.005)

    def wait_until_waiting(self, requests: int, seconds: float = 20) -> None:
        """Until that many requests stand in the engine's queue."""
        deadline = time.monotonic() + seconds
        while (waiting := self.gauges()["deepseek_fp4_num_requests_waiting"]) != requests:
            assert time.monotonic() < deadline, f"{waiting:.0f} requests wait, not {requests}"
            time.sleep(0.005)

    def gauges(self) -> dict[str, float]:
        """Every sample of /metrics, by name and labels, of which the model's name is left out."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        text = re.sub(r'model_name="[^"]*",|,?model_name="[^"]*"', "", text).replace("{}", "")
        lines = text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


@contextlib.contextmanager
def running_server(
    folder: Path,
    *arguments: str,
    model: Path | str = R1_NANO,
    command: list[str] | None = None,
    program: str | None = None,
    ready: float = 60,
) -> Iterator[Server]:
    """Start, wait until /health answers, stop by SIGTERM at the end (unless the test has ended it).

    command: the whole command line, PORT in it.  program: Python source that runs the command line.
    """
    port = free_port()
    log_path = folder / f"server-{port}.log"
    if command is None:
        command = ["serve", str(model), "--port", str(port), "--host", "127.0.0.1", *arguments]
    else:
        command = [argument.replace("PORT", str(port)) for argument in command]
    began = time.perf_counter()
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [*(Server.program() if program is None else [sys.executable, "-c", program]), *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
    try:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            assert process.poll() is None, f"the server ended with {process.returncode}:\n{log_path.read_text()}"
            assert time.perf_counter() - began < ready, f"not ready after {ready} s:\n{log_path.read_text()}"
            time.sleep(0.02)
        yield Server(process, port, log_path, Path(model).name, time.perf_counter() - began)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
