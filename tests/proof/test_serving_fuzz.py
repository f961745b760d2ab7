"""Schemathesis over the served OpenAPI: thousands of generated requests, valid and not; no 5xx, no hang."""

import subprocess
import sys

import httpx
import pytest

from tests.end_to_end.server_process import running_server

pytest.importorskip("schemathesis", reason="schemathesis is not installed")

REQUESTS = 5000


@pytest.mark.proof
def test_generated_requests_never_break_the_server(tmp_path):
    (tmp_path / "short.yaml").write_text("max_new_tokens: 8\n")
    arguments = ["--max_seq_len", "128", "--max_batch_size", "16", "--max_queue", "1000", "--tool_parser",
                 "deepseek_v3", "--config", "short.yaml"]  # fmt: skip
    with running_server(tmp_path, *arguments) as server:
        total, rounds = 0, 0
        while total < REQUESTS:
            rounds += 1
            before = counted(server)
            done = subprocess.run(
                [
                    sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run",
                    f"{server.url}/openapi.json", "--checks",
                    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
                    "response_headers_conformance",
                    "--max-examples", "300", "--request-timeout", "60", "--seed", str(rounds), "--workers", "2",
                    "--phases", "examples,coverage,fuzzing", "--no-color", "--generation-database", "none",
                    "--exclude-path", "/health_generate", "--continue-on-failure",
                ],
                capture_output=True, text=True, timeout=3000, cwd=tmp_path,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
            total += counted(server) - before
        statuses: dict[str, float] = {}
        for name, value in server.gauges().items():
            if name.startswith("deepseek_fp4_http_responses_total"):
                status = name.split('status="')[1][:3]
                statuses[status] = statuses.get(status, 0) + value
        print(f"\n{total} requests in {rounds} rounds; responses by status {statuses}")
        assert not [status for status in statuses if status.startswith("5")]
        assert statuses["200"] > total / 20
        assert "Traceback" not in server.log
        server.wait_idle()
        assert httpx.get(f"{server.url}/health_generate", timeout=30).status_code == 200


def counted(server) -> int:
    return int(sum(v for k, v in server.gauges().items() if k.startswith("deepseek_fp4_http_responses_total")))
