"""A server whose model has a damaged weight, and what it says of itself: one request's failure is that request's alone.

The same server is asked over raw sockets for what HTTP leaves to it.
"""

import json
import re
import signal
import socket
import subprocess
import threading
import time

import httpx
import pytest

from deepseek_fp4_plugin.config import SamplingParams
from deepseek_fp4_plugin.llm import LLM, GenerationError
from tests.end_to_end.server_process import R1_NANO, Server, running_server
from tests.unit.test_diagnosis import NAN, damage

NAMED = "model.embed_tokens.weight has nan at [93, 11]"  # 93 is the token Z


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """r1_nano with NaN in the embedding of one token."""
    return damage(R1_NANO, tmp_path_factory.mktemp("damaged") / "model", "model.embed_tokens.weight", (93, 11), NAN)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    (tmp_path_factory.getbasetemp() / "mtp.yaml").write_text("speculative_config: {num_nextn_predict_layers: 2}\n")
    config = str(tmp_path_factory.getbasetemp() / "mtp.yaml")
    arguments = ("--max_batch_size", "4", "--max_seq_len", "2048", "--config", config, "--served_model_name", "m")
    with running_server(tmp_path_factory.mktemp("server"), *arguments, model=folder) as running:
        running.name = "m"
        yield running


# ---------------------------------------------------------------------------- logits that are not finite


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1.0, "logprobs": 2}, {"guided_regex": "a+"},
                                    {"echo": True, "logprobs": 1}, {"n": 2, "temperature": 1.0}])  # fmt: skip
def test_the_answer_is_500_with_the_weight(server, fields):
    answer = server.complete("aZb", **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (500, "InternalServerError", 500)
    assert NAMED in error["message"] and "model.embed_tokens is the first module" in error["message"]
    assert str(R1_NANO.parent) not in error["message"]


def test_a_stream_ends_in_an_error_event(server):
    for ask in (lambda: server.complete("aZb", stream=True), lambda: server.chat("Z", stream=True)):
        text = ask().text
        assert "[DONE]" not in text
        assert NAMED in json.loads(text.rstrip().rpartition("data: ")[2])["error"]["message"]


def test_the_others_go_on_and_the_server_lives(server):
    alone = server.complete("What is 7 + 8?", temperature=0, max_tokens=48).json()["choices"][0]["text"]
    answers = {}

    def ask(number: int) -> None:
        prompt = "aZb" if number % 2 else "What is 7 + 8?"
        answers[number] = server.complete(prompt, temperature=0, max_tokens=48)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[number].status_code for number in range(6)] == [200, 500] * 3
    assert {answers[number].json()["choices"][0]["text"] for number in (0, 2, 4)} == {alone}
    gauges = server.wait_idle()
    assert gauges['deepseek_fp4_request_finished_total{reason="error"}'] >= 3
    assert gauges["deepseek_fp4_kv_cache_blocks_used"] == 0
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert "Traceback" not in server.log


def test_in_python_all_are_finished_before_one_is_raised(folder):
    with LLM(model=str(folder), max_batch_size=4, max_seq_len=256) as llm:
        with pytest.raises(GenerationError, match=re.escape(NAMED)) as caught:
            llm.generate(["abc", "aZb", "1 2 3"], SamplingParams(max_tokens=5))
        assert [output.outputs[0].finish_reason for output in caught.value.outputs] == ["length", "error", "length"]
        assert [len(output.outputs[0].token_ids) for output in caught.value.outputs] == [5, 0, 5]
        handle = llm.generate_async("aZb", streaming=True)
        for _ in range(2):  # asked again, it says so again
            with pytest.raises(GenerationError, match=re.escape(NAMED)):
                handle.result()


def test_generate_ends_with_status_1(folder, tmp_path):
    command = [*Server.program(), "generate", str(folder), "abc", "aZb", "--max-new-tokens", "5", "--json", "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 1
    assert NAMED in done.stderr and "Traceback" not in done.stderr
    good, failed = json.loads((tmp_path / "out.json").read_text())
    assert (good["finish_reason"], good["error"]) == ("length", None)
    assert failed["finish_reason"] == "error" and NAMED in failed["error"]
    done = subprocess.run([*Server.program(), "chat", str(folder)], input="Z\n", capture_output=True, text=True,
                          timeout=120, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 1
    assert NAMED in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------- the start-up lines


def test_the_start_up_figures_are_true(server, folder):
    log = server.log
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    size, unit = re.search(r"weights ([\d.]+) ([GM])iB", log).groups()
    weights = float(size) * (2**30 if unit == "G" else 2**20)
    assert 0.9 * stored < weights < 2.5 * stored  # the norms and the router are held in wider types
    assert '"max_new_tokens": null' in log  # what a server uses where nothing says it
    assert f"ready on http://127.0.0.1:{server.port}" in log


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_the_port_that_was_taken_is_shown(tmp_path, host, shown):
    if host == "::1" and not _has_ipv6():
        pytest.skip("this machine has no IPv6")
    command = [*Server.program(), "serve", str(R1_NANO), "--host", host, "--port", "0", "--max_batch_size", "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as run:
        try:
            line = next(line for line in run.stderr if "ready on" in line)
            url = line.split()[-1]
            assert re.fullmatch(rf"http://{re.escape(shown)}:[1-9]\d*", url)
            assert httpx.get(f"{url}/health", timeout=20).status_code == 200
        finally:
            run.send_signal(signal.SIGTERM)
        run.stderr.read()
        assert run.wait(30) == 0


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


# ---------------------------------------------------------------------------- heads, bodies, HTTP/1.0


def exchange(server: Server, sent: bytes, *more: bytes) -> bytes:
    """What comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        received = b""
        try:
            connection.sendall(sent)
            for part in more:
                time.sleep(0.05)
                connection.sendall(part)
            while piece := connection.recv(65536):
                received += piece
        except (ConnectionResetError, BrokenPipeError):
            pass
        return received


@pytest.mark.parametrize("cut", [0, 100, 40_000])
def test_a_head_over_64_kib_is_closed_however_it_comes(server, cut):
    def head(size: int) -> bytes:
        start = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Fill: "
        return start + b"a" * (size - len(start)) + b"\r\n\r\n"

    for size, answered in ((60_000, True), (65_536, True), (65_537, False), (70_000, False), (200_000, False)):
        sent = head(size)
        received = exchange(server, *(sent[:cut], sent[cut:]) if cut else (sent,))
        assert received.startswith(b"HTTP/1.1 200") == answered, size


def test_a_large_body_in_the_same_packet_is_no_head(server):
    body = json.dumps({"prompt": "a" * 100_000}).encode()
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    received = exchange(server, head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert received.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("stream", [True, False])
def test_http_1_0_gets_no_chunks(server, stream):
    body = json.dumps({"model": "m", "prompt": "abc", "max_tokens": 8, "temperature": 0, "stream": stream}).encode()
    request = b"POST /v1/completions HTTP/%s\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    request += b"Content-Length: %d\r\n\r\n" % len(body) + body
    old, new = (exchange(server, request.replace(b"%s", version, 1)) for version in (b"1.0", b"1.1"))
    head, _, content = old.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and b"connection: close" in head
    assert b"chunked" not in head
    assert (b"chunked" in new.partition(b"\r\n\r\n")[0]) == stream
    if stream:
        events = content.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert all(event.startswith("data: {") for event in events[:-2])
    else:
        assert json.loads(content)["object"] == "text_completion"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
def test_an_empty_body_is_called_so(server, path):
    for headers in ({}, {"Content-Type": "application/json"}):
        answer = httpx.post(f"{server.url}{path}", headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("the body is empty; send a JSON object")


# ---------------------------------------------------------------------------- asked twice to end


def test_sigint_twice_ends_at_once_and_tells_the_clients(tmp_path):
    with running_server(tmp_path, "--max_batch_size", "4") as server:
        whole: dict[str, httpx.Response] = {}
        fields = {"max_tokens": 3000, "ignore_eos": True}
        threads = [
            threading.Thread(target=lambda: whole.update(plain=server.complete(**fields))),
            threading.Thread(target=lambda: whole.update(stream=server.complete(stream=True, **fields))),
        ]
        for thread in threads:
            thread.start()
        while server.gauges()["deepseek_fp4_num_requests_running"] < 2:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGINT)
        server.wait_for_line("draining, 2 answers")
        server.process.send_signal(signal.SIGINT)
        for thread in threads:
            thread.join()
        assert server.process.wait(20) == 0
        assert whole["plain"].status_code == 503
        assert "shutting down" in whole["plain"].json()["error"]["message"]
        assert "shutting down" in json.loads(whole["stream"].text.rstrip().rpartition("data: ")[2])["error"]["message"]
        assert "Traceback" not in server.log and "CancelledError" not in server.log


def test_sigint_twice_does_not_wait_for_a_client_that_reads_nothing(tmp_path):
    with running_server(tmp_path, "--max_batch_size", "4") as server:
        fields = {"model": server.name, "prompt": "abc", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        body = json.dumps({**fields, "n": 2, "temperature": 1.0, "logprobs": 20}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                               b"Content-Length: %d\r\n\r\n" % len(body) + body)  # fmt: skip
            while server.gauges()["deepseek_fp4_num_requests_running"] < 2:
                time.sleep(0.01)
            time.sleep(0.5)
            server.process.send_signal(signal.SIGINT)
            server.wait_for_line("draining")
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(25) == 0
        assert "Traceback" not in server.log and "CancelledError" not in server.log
