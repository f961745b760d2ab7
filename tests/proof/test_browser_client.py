"""OpenAI's JavaScript client in a browser, on a page of another origin than the server's.

The client is fetched from npm; its ES modules need no bundler.
"""

import functools
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator

import pytest

from tests.end_to_end.server_process import running_server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CLIENT = "openai@6.49.0"
PAGE = """<!doctype html><link rel="icon" href="data:,"><script type="module">
import OpenAI from "/package/index.mjs";
window.OpenAI = OpenAI;
window.make = (baseURL, apiKey) => new OpenAI({baseURL, apiKey, maxRetries: 0, dangerouslyAllowBrowser: true});
window.attempt = async (call) => {
  try { return {value: await call()}; } catch (error) {
    return {kind: error.constructor.name, status: error.status, message: error.message, id: error.requestID};
  }
};
</script>"""
QUESTION = [{"role": "user", "content": "What is 607 + 68?"}]
pytestmark = pytest.mark.proof


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[int]:
    """The port of a static server with the client and a page that imports it."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm to fetch the client with")
    folder = tmp_path_factory.mktemp("site")
    fetched = subprocess.run([npm, "pack", "--silent", CLIENT], cwd=folder, capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(f"npm cannot fetch {CLIENT} here: {(fetched.stderr.strip() or 'no reason').splitlines()[-1]}")
    shutil.unpack_archive(folder / fetched.stdout.strip(), folder, "gztar", filter="data")
    (folder / "index.html").write_text(PAGE)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture(scope="module")
def server(site, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    (folder / "keys").write_text("secret\n")
    arguments = ["--max_seq_len", "2048", "--tool_parser", "deepseek_v3", "--reasoning_parser", "deepseek-r1-0528",
                 "--api_key_file", "keys", "--allowed_origin", f"http://localhost:{site}"]  # fmt: skip
    with running_server(folder, *arguments) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, origin: str):
    page = browser.new_page()
    page.goto(origin)
    page.wait_for_function("window.attempt !== undefined")
    return page


def run(page, server, body: str, key: str = "secret", **fields) -> dict:
    """What `body`, the inside of an asynchronous function of `client` and `fields`, returns or fails with."""
    fields = {"model": server.name, "temperature": 0, **fields}
    source = f"([url, key, fields]) => attempt(async () => {{ const client = make(url, key); {body} }})"
    return page.evaluate(source, [f"{server.url}/v1", key, fields])


CHAT = "return await client.chat.completions.create(fields);"


def test_a_page_of_an_allowed_origin_chats_and_streams(browser, server, site):
    page = opened(browser, f"http://localhost:{site}")
    whole = run(page, server, CHAT, messages=QUESTION)["value"]
    message = whole["choices"][0]["message"]
    assert "675" in message["content"]
    streamed = """
        const seen = {pieces: 0, content: "", thinking: ""};
        for await (const chunk of await client.chat.completions.create({...fields, stream: true})) {
            const delta = chunk.choices[0]?.delta ?? {};
            seen.pieces += 1;
            seen.content += delta.content ?? "";
            seen.thinking += delta.reasoning_content ?? "";
        }
        return seen;"""
    seen = run(page, server, streamed, messages=QUESTION)["value"]
    assert seen["pieces"] > 10
    assert (seen["content"], seen["thinking"]) == (message["content"], message["reasoning_content"])
    response = "return (await client.responses.stream(fields).finalResponse()).output_text;"
    assert run(page, server, response, input=QUESTION)["value"] == message["content"]
    assert [m["id"] for m in run(page, server, "return (await client.models.list()).data;")["value"]] == [server.name]


def test_the_page_may_stop_its_stream(browser, server, site):
    page = opened(browser, f"http://localhost:{site}")
    body = """
        const stream = await client.chat.completions.create({...fields, stream: true});
        for await (const chunk of stream) { stream.controller.abort(); }
        return "stopped";"""
    asked = {"messages": QUESTION, "max_tokens": 1500, "ignore_eos": True}
    assert run(page, server, body, **asked) == {"value": "stopped"}


def test_errors_reach_the_page(browser, server, site):
    page = opened(browser, f"http://localhost:{site}")
    for kind, status, fields in (
        ("NotFoundError", 404, {"model": "gpt"}),
        ("BadRequestError", 400, {"temperature": -1}),
        ("AuthenticationError", 401, {"key": "wrong"}),
    ):
        error = run(page, server, CHAT, messages=QUESTION, **fields)
        assert (error["kind"], error["status"]) == (kind, status)
    assert error["id"], "X-Request-Id is not shown to the page"


def test_a_page_of_any_other_origin_learns_nothing(browser, server, site):
    page = opened(browser, f"http://127.0.0.1:{site}")  # the same page, but another origin to a browser
    before = len(server.log)
    for body in (CHAT, "return await client.models.list();"):
        error = run(page, server, body, messages=QUESTION)
        assert error["kind"] == "APIConnectionError" and "value" not in error
    answered = [json.loads(line) for line in server.log[before:].splitlines() if line.startswith("{")]
    assert [(line["method"], line["status"]) for line in answered] == [("OPTIONS", 400)] * 2
