"""The card's server command as it stands, `--tp_size 8 --ep_size 2`: eight processes of one thread each.

Its curl gets its answer; a rank that is killed or stopped is told within ten seconds; SIGTERM leaves nothing behind.
"""

import json
import os
import signal
import subprocess
import time

import httpx
import psutil
import pytest

from tests.end_to_end.server_process import Server, running_server
from tests.end_to_end.test_server import CARD_COMMAND, CARD_CURL, CARD_YAML
from tests.end_to_end.test_workers import workers

pytestmark = pytest.mark.proof
LIMIT = 10.0


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    (folder / "args.yaml").write_text(CARD_YAML)
    command = (
        CARD_COMMAND.replace("\\\n", " ").replace("--tp_size 1", "--tp_size 8").replace("--ep_size 1", "--ep_size 2")
    )
    with running_server(folder, command=[*command.split(), "--restart_on_failure"], ready=300) as running:
        yield running


def test_the_cards_curl_gets_its_answer(server: Server):
    found = workers(server.process.pid)
    assert len(found) == 8
    if len(os.sched_getaffinity(0)) < 16:
        assert {process.environ()["OMP_NUM_THREADS"] for process in found} == {"1"}
    command = CARD_CURL.replace("PORT", str(server.port)).replace("MODEL", server.name)
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=900, check=True)
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")
    assert answer["choices"][0]["message"]["content"].startswith("<think>")
    print(answer["usage"], answer["choices"][0]["message"]["content"][:200])


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_is_told_and_served_again(server: Server, blow: signal.Signals):
    found = workers(server.process.pid)
    body = {"model": server.name, "prompt": "abc", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        began = time.monotonic()
        found[5].send_signal(blow)
        last = list(lines)[-1]
    seconds = time.monotonic() - began
    assert seconds < LIMIT
    assert "error" in json.loads(last.removeprefix("data: "))
    health = httpx.get(f"{server.url}/health", timeout=30)
    assert health.status_code == 503
    print(f"told after {seconds:.1f} s: {last}\n/health: {health.text}")
    assert f"process {found[5].pid}" in health.text
    _, alive = psutil.wait_procs(found, timeout=LIMIT)
    assert alive == []
    while httpx.get(f"{server.url}/health", timeout=30).status_code != 200:
        assert time.monotonic() - began < 300
        time.sleep(0.5)
    print(f"served again after {time.monotonic() - began:.0f} s")
    assert server.complete(max_tokens=4).status_code == 200


def test_the_end_leaves_nothing_behind(server: Server):
    found = workers(server.process.pid)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    _, alive = psutil.wait_procs(found, timeout=LIMIT)
    assert alive == []
