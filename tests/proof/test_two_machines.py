"""Two machines, joined by Ray, serve the openai client; each way in which they can break ends in a clear error within
ten seconds, and in service again. The machines are network namespaces with a cable between them that can be pulled.

Needs root, `ip` (iproute2) and Ray.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import httpx
import openai
import psutil
import pytest

pytest.importorskip("ray", reason="Ray is not installed (extra `ray`)")
pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(not shutil.which("ip") or os.geteuid() != 0, reason="network namespaces need root and iproute2"),
]

ENVIRONMENT = os.environ | {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_ADDRESS": "10.77.0.1:6379",
}
NEAR, FAR = "fp4-near", "fp4-far"
SERVER = "http://10.78.0.2:8000"
LIMIT = 10.0  # seconds to an error


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def inside(namespace: str, *command: str) -> list[str]:
    return ["ip", "netns", "exec", namespace, *command]


def processes(namespace: str, words: str) -> list[psutil.Process]:
    """Those of a namespace that have these words in their command line."""
    pids = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True).stdout.split()
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if words in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.fixture(scope="module")
def machines():
    """near and far, a cable between them (10.77.0.0/24), and one from here to near that is never pulled."""
    for name in (NEAR, FAR):
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
    ip("link", "add", "cable0", "netns", NEAR, "type", "veth", "peer", "name", "cable1", "netns", FAR)
    ip("link", "add", "fp4-here", "type", "veth", "peer", "name", "here", "netns", NEAR)
    for namespace, link, address in (
        (NEAR, "cable0", "10.77.0.1"),
        (FAR, "cable1", "10.77.0.2"),
        (NEAR, "here", "10.78.0.2"),
    ):
        ip("-n", namespace, "addr", "add", f"{address}/24", "dev", link)
        ip("-n", namespace, "link", "set", link, "up")
    ip("addr", "add", "10.78.0.1/24", "dev", "fp4-here")
    ip("link", "set", "fp4-here", "up")
    try:
        yield
    finally:
        for name in (NEAR, FAR):
            for process in processes(name, ""):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            ip("netns", "del", name)


@pytest.fixture(scope="module")
def cluster(machines):
    """A Ray cluster of one CPU on each machine."""
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus", "1", "--disable-usage-stats"]
    temp = tempfile.mkdtemp(prefix="ray")  # short: paths of sockets below it have at most 107 characters
    for namespace, own in (
        (NEAR, ["--head", "--port", "6379", "--include-dashboard", "false", "--node-ip-address", "10.77.0.1",
                "--temp-dir", str(temp)]),
        (FAR, ["--address", "10.77.0.1:6379", "--node-ip-address", "10.77.0.2"]),
    ):  # fmt: skip
        done = subprocess.run(
            inside(namespace, *ray, *own), env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    yield
    shutil.rmtree(temp, ignore_errors=True)


class Front:
    """The server on the near machine, its log kept."""

    def __init__(self, log):
        command = ["serve", "r1_nano", "--host", "0.0.0.0", "--port", "8000", "--tp_size", "2", "--max_batch_size", "4",
                   "--orchestrator_type", "ray", "--restart_on_failure"]  # fmt: skip
        self.log = log
        with log.open("a") as out:
            self.process = subprocess.Popen(
                inside(NEAR, sys.executable, "-c", "from deepseek_fp4_plugin.cli import main; main()", *command),
                env=ENVIRONMENT,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.wait_healthy(180)

    def wait_healthy(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{SERVER}/health", timeout=5).status_code == 200:
                    return
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"not serving after {seconds} s:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.2)


def client() -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{SERVER}/v1", api_key="none", max_retries=0, timeout=60)


def ask() -> str:
    messages = [{"role": "user", "content": "What is 7 + 8?"}]
    answer = client().chat.completions.create(model="r1_nano", messages=messages, max_tokens=64, temperature=0)
    return answer.choices[0].message.content


class Streams:
    """Clients with answers under way; each notes when and how it ended."""

    def __init__(self, count: int):
        self.errors: list[tuple[float, Exception | None]] = []
        self._threads = [threading.Thread(target=self._read, daemon=True) for _ in range(count)]
        self._running = threading.Semaphore(0)
        for thread in self._threads:
            thread.start()
        for _ in range(count):
            assert self._running.acquire(timeout=60)

    def _read(self) -> None:
        error = None
        try:
            stream = client().completions.create(
                model="r1_nano", prompt="abc", max_tokens=100_000, stream=True, extra_body={"ignore_eos": True}
            )
            for index, _ in enumerate(stream):
                if index == 1:
                    self._running.release()
        except Exception as raised:
            error = raised
        self.errors.append((time.monotonic(), error))

    def ended(self, began: float) -> None:
        """All ended within the limit, and with an error."""
        for thread in self._threads:
            thread.join(max(0.0, began + LIMIT - time.monotonic()))
        assert len(self.errors) == len(self._threads), f"{len(self.errors)} of {len(self._threads)} clients were told"
        for when, error in self.errors:
            assert isinstance(error, openai.OpenAIError | httpx.HTTPError), repr(error)
            assert when - began < LIMIT
            print(f"  client told after {when - began:.1f} s: {error}")


@pytest.fixture(scope="module")
def front(cluster, tmp_path_factory):
    front = Front(tmp_path_factory.mktemp("front") / "log")
    yield front
    front.process.kill()
    front.process.wait()


def far_worker() -> psutil.Process:
    (worker,) = processes(FAR, "RayWorker.run")
    return worker


def test_two_machines_answer(front):
    assert len(processes(NEAR, "RayWorker.run")) == len(processes(FAR, "RayWorker.run")) == 1
    assert "15" in ask()


@pytest.mark.parametrize("blow", ["kill", "stop", "cut"])
def test_a_broken_rank_is_told_and_served_again(front, blow):
    expected, streams = ask(), Streams(3)
    worker, began = far_worker(), time.monotonic()
    if blow == "cut":
        ip("-n", FAR, "link", "set", "cable1", "down")
    else:
        worker.send_signal(signal.SIGKILL if blow == "kill" else signal.SIGSTOP)
    streams.ended(began)
    health = httpx.get(f"{SERVER}/health", timeout=5)
    told = json.loads(health.content)["error"]["message"]
    print(f"  /health {health.status_code}: {told}")
    assert health.status_code == 503
    assert f" of 2 (process {worker.pid} on 10.77.0.2) " in told
    with pytest.raises(openai.APIStatusError, match="rank"):
        ask()
    if blow == "cut":
        time.sleep(5)
        ip("-n", FAR, "link", "set", "cable1", "up")
    front.wait_healthy(240)
    assert ask() == expected
    print(f"  served again {time.monotonic() - began:.0f} s after the blow")
    psutil.wait_procs([worker], timeout=20)
    assert not worker.is_running()


def test_a_killed_front_leaves_nothing_and_a_new_one_serves(front):
    streams, workers = Streams(2), processes(NEAR, "RayWorker.run") + processes(FAR, "RayWorker.run")
    (server,) = processes(NEAR, "serve r1_nano")
    began = time.monotonic()
    server.kill()
    streams.ended(began)
    _, alive = psutil.wait_procs(workers, timeout=LIMIT)
    assert alive == []
    front.process.wait()
    again = Front(front.log)
    try:
        assert "15" in ask()
    finally:
        (server,) = processes(NEAR, "serve r1_nano")
        server.send_signal(signal.SIGTERM)
        assert again.process.wait(60) == 0
    assert processes(NEAR, "RayWorker.run") + processes(FAR, "RayWorker.run") == []
