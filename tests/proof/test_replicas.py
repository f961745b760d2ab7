"""Two replicas behind examples/replicas/haproxy.cfg: like prompts go to one, and a lost one is nobody's loss."""

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import openai
import pytest

from tests.end_to_end.server_process import free_port, running_server

CONFIG = Path(__file__).parents[2] / "examples" / "replicas" / "haproxy.cfg"
pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="HAProxy is not installed"),
]


@pytest.fixture
def replicas(tmp_path):
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(running_server(tmp_path, "--drain_timeout", "5")) for _ in range(2)]
        port = free_port()
        environment = os.environ | {
            "ADDRESS": f"127.0.0.1:{port}",
            "REPLICA_ONE": f"127.0.0.1:{servers[0].port}",
            "REPLICA_TWO": f"127.0.0.1:{servers[1].port}",
        }
        proxy = subprocess.Popen(["haproxy", "-db", "-f", str(CONFIG)], env=environment)
        try:
            deadline = time.monotonic() + 20
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                        break
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield servers, openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60)
        finally:
            proxy.terminate()
            proxy.wait(20)


def answered(servers) -> list[int]:
    """Completions that each replica has answered."""
    name = 'deepseek_fp4_http_responses_total{method="POST",route="/v1/completions",status="200"}'
    return [int(server.gauges().get(name, 0)) for server in servers]


def test_two_replicas(replicas):
    servers, client = replicas

    def ask(prompt: str) -> str:
        answer = client.completions.create(model="r1_nano", prompt=prompt, max_tokens=4, temperature=0)
        return answer.choices[0].text

    beginnings = [f"{number} " * 700 for number in range(12)]
    texts = [ask(beginning + "first") for beginning in beginnings]
    both = answered(servers)
    assert sum(both) == 12 and min(both) >= 1  # different beginnings are spread
    reused = sum(server.gauges()["deepseek_fp4_prefix_cache_hit_tokens_total"] for server in servers)
    for beginning in beginnings:
        ask(beginning + "second")
    hits = sum(server.gauges()["deepseek_fp4_prefix_cache_hit_tokens_total"] for server in servers) - reused
    print(f"  {both} answers; {hits:.0f} prompt tokens found in the caches on the second round")
    assert hits > 12 * 500  # each came back to where its beginning is cached
    servers[0].process.kill()  # and from then on the other one serves all, without an error
    assert [ask(beginning + "first") for beginning in beginnings] == texts
    client.models.list()
