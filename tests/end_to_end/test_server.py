"""The card's server: its command, YAML and curl as they stand, routes beside generation, keys, limits, signals."""

import contextlib
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
from deepseek_fp4_plugin.llm import LLM
from tests.end_to_end.server_process import HELD, R1_NANO, TEN_STEPS_A_SECOND, Server, free_port, running_server

# Word for word the model card's file and command, but for the program's name, the model path and two sizes of 1.
CARD_YAML = """moe_backend: TRTLLM
use_cuda_graph: true
speculative_config:
  decoding_type: MTP
  num_nextn_predict_layers: 3
  use_relaxed_acceptance_for_thinking: true
  relaxed_topk: 10
  relaxed_delta: 0.6
"""
CARD_COMMAND = f"""serve {R1_NANO} \\
  --host 0.0.0.0 \\
  --port PORT \\
  --backend pytorch \\
  --max_batch_size 4 \\
  --tp_size 1 \\
  --ep_size 1 \\
  --max_num_tokens 32768 \\
  --trust_remote_code \\
  --extra_llm_api_options args.yaml \\
  --kv_cache_free_gpu_memory_fraction 0.75
"""
CARD_CURL = """curl localhost:PORT/v1/chat/completions \\
  -H "Content-Type: application/json" \\
  -d '{
    "model": "MODEL",
    "messages": [{"role": "user", "content": "Why is NVIDIA a great company?"}],
    "max_tokens": 1024
  }'
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    (folder / "args.yaml").write_text(CARD_YAML)
    with running_server(folder, command=CARD_COMMAND.replace("\\\n", " ").split()) as running:
        yield running


def test_the_cards_command_is_ready_within_ten_seconds(server):
    assert server.seconds < 10
    log = server.log
    assert '"num_nextn_predict_layers":3' in log.replace(" ", "")
    assert re.search(r"loaded in [\d.]+ s; memory: .*weights [\d.]+ [GM]iB", log)
    assert re.search(r"\nkernels: \d+ FP8_BLOCK weights: cpu \(native kernels", log)
    assert "sampling defaults: temperature 0.6, top_p 0.95" in log


def test_the_cards_curl(server):
    command = CARD_CURL.replace("PORT", str(server.port)).replace("MODEL", server.name)
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    body = json.loads(done.stdout)
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert isinstance(choice["message"]["content"], str)
    assert choice["finish_reason"] in ("stop", "length")
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_http_gives_what_llm_generate_gives(server):
    prompts = ["What is 7 + 8?", "abc", "1 2 3"]
    params = {"max_tokens": 24, "temperature": 0}
    with LLM(model=R1_NANO, max_batch_size=4, max_seq_len=512) as llm:
        expected = [o.outputs[0].text for o in llm.generate(prompts, SamplingParams(**params))]
        chat = llm.chat([{"role": "user", "content": prompts[0]}], SamplingParams(**params)).outputs[0].text
    strict = {**params, "relaxed_acceptance": False}
    assert [server.complete(p, **strict).json()["choices"][0]["text"] for p in prompts] == expected
    assert server.chat(prompts[0], **strict).json()["choices"][0]["message"]["content"] == chat


def test_routes_beside_generation(server):
    with server.client() as client:
        assert client.get("/health").status_code == 200
        assert client.get("/health").content == b""
        assert client.get("/ping").status_code == 200
        for path in ("/health", "/ping", "/v1/models", "/v1/models/r1_nano", "/version", "/metrics", "/"):
            head = client.head(path)
            assert (head.status_code, head.content) == (200, b""), path
        assert client.head("/v1/models/other").status_code == 404
        assert client.head("/iteration_stats").status_code == 405  # reading them takes them away
        assert client.get("/health_generate").status_code == 200
        assert set(client.get("/version").json()) == {"version"}
        (card,) = client.get("/v1/models").json()["data"]
        assert (card["id"], card["object"]) == ("r1_nano", "model")
        assert client.get("/v1/models/r1_nano").json() == card
        assert client.get("/v1/models/other").status_code == 404
        tokens = client.post("/tokenize", json={"prompt": "héllo 你"}).json()
        assert tokens["count"] == len(tokens["tokens"])
        assert client.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "héllo 你"}
        chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}],
                                              "return_token_strs": True}).json()  # fmt: skip
        assert chat["token_strs"][-1] == "<｜Assistant｜>"
        assert client.post("/tokenize", json={}).status_code == 400
        assert client.post("/detokenize", json={"tokens": [10**9]}).status_code == 400
        assert client.get("/nowhere").json()["error"]["type"] == "NotFoundError"
        assert client.get("/v1/completions").status_code == 405
        for path in ("/../pyproject.toml", "/%2e%2e/pyproject.toml", "/playground/index.html", "//etc/passwd"):
            assert client.get(path).status_code == 404


def test_metrics_and_iteration_statistics(server):
    before = server.gauges()
    with server.client() as client:
        client.get("/iteration_stats")
        server.complete(max_tokens=8, ignore_eos=True)
        after = server.gauges()
        stats = client.get("/iteration_stats").json()
        assert client.get("/iteration_stats").json() == []
    name = "deepseek_fp4_generation_tokens_total"
    assert after[name] - before[name] == 8
    finished = 'deepseek_fp4_request_finished_total{reason="length"}'
    assert after[finished] - before.get(finished, 0) == 1
    assert sum(entry["generated_tokens"] for entry in stats) == 8
    assert all(entry["seconds"] > 0 for entry in stats)


def test_request_ids_are_kept_or_made(server):
    given = httpx.get(f"{server.url}/version", headers={"X-Request-Id": "abc-123"})
    assert given.headers["x-request-id"] == "abc-123"
    made = httpx.get(f"{server.url}/version", headers={"X-Request-Id": 'x"\t{evil}'})
    assert re.fullmatch(r"[0-9a-f]{32}", made.headers["x-request-id"])
    assert any(json.loads(line)["request_id"] == "abc-123" for line in server.log.splitlines() if line.startswith("{"))


def test_bodies_that_are_no_requests(server):
    with server.client() as client:

        def post(content: bytes, kind: str = "application/json") -> httpx.Response:
            return client.post("/v1/chat/completions", content=content, headers={"Content-Type": kind})

        for content in (b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000,
                        b'{"a":' * 50_000, b'{"model": "r1_nano", "prompt": "\\ud800"}'):  # fmt: skip
            response = post(content)
            assert response.status_code == 400, content[:30]
            assert response.json()["error"]["message"]
        assert post(b"{}", "text/plain").status_code == 400
        assert post(b" " * ((16 << 20) + 1)).status_code == 413
        assert client.get("/health").status_code == 200


def test_cors_is_closed(server):
    response = httpx.options(f"{server.url}/v1/models", headers={
        "Origin": "http://evil.example", "Access-Control-Request-Method": "GET"})  # fmt: skip
    assert "access-control-allow-origin" not in response.headers
    response = httpx.get(f"{server.url}/v1/models", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in response.headers


def test_a_client_that_goes_frees_its_request(server):
    body = {"model": server.name, "prompt": "abc", "max_tokens": 20_000, "ignore_eos": True}
    for stream in (True, False):
        payload = json.dumps({**body, "stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n"
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + payload)
            deadline = time.monotonic() + 10
            while server.gauges()["deepseek_fp4_num_requests_running"] == 0:
                assert time.monotonic() < deadline
        assert server.wait_idle(10)["deepseek_fp4_kv_cache_blocks_used"] == 0


def test_a_note_about_system_prompts_is_logged_once(server):
    for _ in range(2):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
        assert server.chat(messages=messages).status_code == 200
    assert server.log.count("system prompt") == 1


def test_keys_guard_everything_but_health(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first-key\n\nsecond-key\n")
    options = ("--api_key_file", str(keys), "--max_seq_len", "512", "--allowed_origin", "https://app.example")
    with running_server(tmp_path, *options) as server:
        with server.client() as client:
            paths = client.get("/openapi.json", headers={"Authorization": "Bearer first-key"}).json()["paths"]
            for path, methods in [*paths.items(), ("/", {"get": {}}), ("/docs", {"get": {}}), ("/nowhere", {"get": {}}),
                                  ("/openapi.json", {"get": {}})]:  # fmt: skip
                for method in methods:
                    for value in (None, "Bearer wrong", "Bearer first-key2", "Bearer", "Basic !!", "first-key"):
                        headers = {"Authorization": value} if value else {}
                        status = client.request(method, path, headers=headers).status_code
                        assert status == (200 if path in ("/health", "/ping") else 401), (path, method, value)
            for key in ("first-key", "second-key"):
                assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
                for name in ("x-api-key", "api-key"):  # Anthropic's clients, Azure's
                    assert client.get("/v1/models", headers={name: key}).status_code == 200
                    assert client.get("/v1/models", headers={name: key + "2"}).status_code == 401
            assert client.get("/", auth=("anyone", "second-key")).status_code == 200
            # A browser asks first, without a key, whether it may send what openai's client sends.
            wanted = "authorization,content-type,x-stainless-lang,x-stainless-retry-count,openai-organization"
            asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": wanted}
            for origin, status in (("https://app.example", 200), ("https://other.example", 400)):
                preflight = client.options("/v1/chat/completions", headers={"Origin": origin, **asked})
                assert preflight.status_code == status
                assert preflight.headers.get("access-control-allow-origin") == (origin if status == 200 else None)
            assert set(wanted.split(",")) <= set(
                client.options("/v1/chat/completions", headers={"Origin": "https://app.example", **asked})
                .headers["access-control-allow-headers"].lower().replace(" ", "").split(",")
            )  # fmt: skip
            assert client.get("/").headers["www-authenticate"].startswith("Basic")
        assert "first-key" not in server.log


def test_a_full_queue_is_429_with_retry_after(tmp_path):
    arguments = ["--max_batch_size", "2", "--max_queue", "2", "--max_seq_len", "2048"]
    with running_server(tmp_path, *arguments, program=HELD) as server:
        statuses, retry = [], []
        hold = tmp_path / "hold"
        hold.touch()

        def send():
            response = server.complete(max_tokens=200, ignore_eos=True)
            statuses.append(response.status_code)
            if response.status_code == 429:
                retry.append(response.headers["retry-after"])

        threads = [threading.Thread(target=send) for _ in range(10)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 30
        while len(statuses) < 6 and time.monotonic() < until:  # none of those taken on can end before the others come
            time.sleep(0.01)
        hold.unlink()
        for thread in threads:
            thread.join()
        assert statuses == [429] * 6 + [200] * 4
        assert all(int(value) >= 1 for value in retry)
        assert server.complete(n=5, temperature=1.0).status_code == 400  # would never fit
        assert server.complete(max_tokens=4).status_code == 200


def test_request_timeout_and_body_limits(tmp_path):
    arguments = ["--request_timeout", "1", "--max_body_bytes", "1000", "--body_timeout", "1"]
    with running_server(tmp_path, *arguments, program=TEN_STEPS_A_SECOND) as server:
        assert server.complete("a" * 2000).status_code == 413
        slow = server.complete(max_tokens=30_000, ignore_eos=True)
        assert slow.status_code == 504
        streamed = server.complete(max_tokens=30_000, ignore_eos=True, stream=True)
        last = streamed.text.strip().split("\n\n")[-1]
        assert "longer than this server allows" in json.loads(last.removeprefix("data: "))["error"]["message"]
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                               b"Content-Length: 500\r\n\r\n{")  # fmt: skip
            connection.settimeout(10)
            assert b" 408 " in connection.recv(100)
        for beginning in (b"", b"GET /version HT", b"GET /version HTTP/1.1\r\nHost: x\r\n"):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(beginning)
                connection.settimeout(10)
                assert closed(connection)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:  # two requests, then half of one
            for _ in range(2):
                connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = b""
                while not answer.endswith(b"}"):  # head and body may come in two pieces
                    piece = connection.recv(1000)
                    assert piece, answer
                    answer += piece
                assert answer.startswith(b"HTTP/1.1 200")
            connection.sendall(b"GET /ver")
            connection.settimeout(10)
            assert closed(connection)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:  # a head without end
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"GET / HTTP/1.1\r\n" + b"X-Long: y\r\n" * 20_000)
            connection.settimeout(10)
            assert closed(connection)
        server.wait_idle()


def closed(connection: socket.socket) -> bool:
    """Whether the server closes without an answer."""
    with contextlib.suppress(ConnectionError):
        return connection.recv(100) == b""
    return True


def test_sigterm_drains(tmp_path):
    with running_server(tmp_path, "--drain_timeout", "30", "--max_batch_size", "4") as server:
        results = {}

        def send(name, tokens):
            results[name] = server.complete(max_tokens=tokens, ignore_eos=True, stream=True)

        thread = threading.Thread(target=send, args=("running", 300))
        kept = httpx.Client(base_url=server.url)
        kept.get("/version")
        thread.start()
        while server.gauges()["deepseek_fp4_num_requests_running"] == 0:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        thread.join()
        assert results["running"].text.rstrip().endswith("[DONE]")
        with contextlib.suppress(httpx.HTTPError):
            assert kept.get("/health").status_code == 503
        assert server.process.wait(20) == 0
        assert "draining, 1 answers" in server.log


def test_drain_has_an_end(tmp_path):
    with running_server(tmp_path, "--drain_timeout", "1") as server:
        result = {}

        def send():
            result["whole"] = server.complete(max_tokens=100_000, ignore_eos=True)

        thread = threading.Thread(target=send)
        thread.start()
        while server.gauges()["deepseek_fp4_num_requests_running"] == 0:
            time.sleep(0.01)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        thread.join()
        assert result["whole"].status_code == 503
        assert server.process.wait(20) == 0
        assert time.monotonic() - began < 10


def test_start_mistakes_are_one_sentence(tmp_path):
    def fails(*arguments: str) -> str:
        command = [*Server.program(), "serve", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode in (1, 2)
        assert "Traceback" not in done.stderr
        return done.stderr + done.stdout

    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert "cannot listen" in fails(str(R1_NANO), "--host", "127.0.0.1", "--port", str(port))
    assert "reasoning_parser" in fails(str(R1_NANO), "--reasoning_parser", "other")
    assert "no-such-file" in fails(str(R1_NANO), "--api_key_file", "no-such-file")
    (tmp_path / "empty").write_text("\n")
    assert "holds no key" in fails(str(R1_NANO), "--api_key_file", "empty")
    (tmp_path / "bad.jinja").write_text("{% if %}")
    assert "template" in fails(str(R1_NANO), "--chat_template", "bad.jinja")
    (tmp_path / "bad.yaml").write_text("moe_bakend: x\n")
    assert "moe_backend" in fails(str(R1_NANO), "--extra_llm_api_options", "bad.yaml")


def test_names_template_and_openai_defaults(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ flavour }}"
    (tmp_path / "template.jinja").write_text(template)
    with running_server(tmp_path, "--served_model_name", "one", "--served_model_name", "two", "--chat_template",
                        "template.jinja", "--sampling_defaults", "openai", "--reasoning_parser",
                        "deepseek-r1") as server:  # fmt: skip
        server.name = "two"
        with server.client() as client:
            assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["one", "two"]
            ids = client.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()["tokens"]
            assert client.post("/detokenize", json={"tokens": ids}).json()["prompt"].endswith("[user]hi")
        default = server.complete(seed=1, max_tokens=40, return_token_ids=True).json()["choices"][0]["token_ids"]
        plain = server.complete(seed=1, max_tokens=40, return_token_ids=True, temperature=1.0, top_p=1.0)
        assert default == plain.json()["choices"][0]["token_ids"]
        message = server.chat(chat_template_kwargs={"flavour": "x"}, temperature=0).json()["choices"][0]["message"]
        assert "reasoning_content" in message
        assert server.chat().json()["usage"]["completion_tokens_details"]["reasoning_tokens"] >= 0
