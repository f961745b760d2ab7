"""The playground in a real browser: ask, watch it think, stop it; no console error, no outside request."""

import os
import re
import shutil
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.server_process import running_server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)", allow_module_level=True)
IMAGES = Path(__file__).parents[2] / "docs" / "images"
PROBLEM, ANSWER = "What is 607 + 68?", "675"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    arguments = ["--mtp", "3", "--relaxed", "--max_batch_size", "4", "--max_seq_len", "8192"]
    with running_server(tmp_path_factory.mktemp("playground"), *arguments) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """A page that fails its test on console errors and on requests to anywhere else."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, locale="en-GB")
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((server.url, "data:")) else wrong.append(r.url))
    page.goto(server.url)
    page.locator("#model:not(:empty)").wait_for(state="attached")
    yield page
    context.close()
    assert wrong == []


def greedy(page) -> None:
    if page.locator("#settings").is_hidden():
        page.click("#toggle")
    page.fill("#temperature", "0")
    page.click("#toggle")


def test_a_problem_is_thought_about_and_answered(page):
    greedy(page)
    page.fill("#input", PROBLEM)
    page.keyboard.press("Enter")
    think = page.locator("details.think")
    think.wait_for(state="visible", timeout=60_000)
    page.locator("details.think:not([open])").wait_for(state="attached", timeout=60_000)
    page.locator("#send").wait_for(state="visible", timeout=60_000)
    assert re.fullmatch(r"Thought for [\d.]+ s", think.locator("summary").inner_text())
    assert ANSWER in page.locator(".answer").inner_text()
    assert ANSWER in page.locator(".answer math .boxed").text_content()
    stats = page.locator(".stats").inner_text()
    assert re.search(r"first token \d+ ms", stats)
    assert re.search(r"[\d.]+ tokens/s", stats)
    assert re.search(r"[1-9]\d* % accepted drafts", stats)
    think.locator("summary").click()
    assert think.locator(".plain").inner_text().strip()
    page.check("#drafts")
    assert page.locator("span.draft").count() > 3
    page.uncheck("#drafts")
    assert page.locator("span.draft").count() == 0


def test_thinking_is_seen_while_it_is_written(page):
    """Text grows while the answer is open: the lengths seen by the page are recorded."""
    page.evaluate("""() => { window.seen = []; new MutationObserver(() => {
        const d = document.querySelector('details.think');
        if (d && d.open) window.seen.push(d.querySelector('.plain').textContent.length);
    }).observe(document.getElementById('log'), {subtree: true, childList: true, characterData: true}); }""")
    greedy(page)
    page.fill("#input", "Sort these numbers from largest to smallest: [20, 76, 25, 3, 75, 47].")
    page.click("#send")
    page.locator("#send").wait_for(state="hidden")
    page.locator("#send").wait_for(state="visible", timeout=60_000)
    lengths = [n for n in page.evaluate("window.seen") if n]
    assert len(set(lengths)) >= 2
    assert lengths == sorted(lengths)


def test_an_answer_can_be_stopped(page, server):
    page.click("#toggle")
    page.fill("#temperature", "100")  # rambles
    page.fill("#max_tokens", "8000")
    page.click("#toggle")
    page.fill("#input", "Tell me everything.")
    page.keyboard.press("Enter")
    page.locator(".stats", has_text="tokens").wait_for(timeout=60_000)
    page.keyboard.press("Escape")
    page.locator("#send").wait_for(state="visible", timeout=10_000)
    assert "stopped" in page.locator(".stats").inner_text()
    server.wait_idle(10)


def test_a_new_chat_forgets_the_answer_under_way(page, server):
    """Neither on the page nor in what is sent: the old answer is aborted, and its end changes nothing any more."""
    bodies = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if r.url.endswith("completions") else None)
    page.click("#toggle")
    page.fill("#temperature", "100")  # rambles
    page.fill("#max_tokens", "8000")
    page.click("#toggle")
    page.fill("#input", "Tell me everything.")
    page.keyboard.press("Enter")
    page.locator(".stats", has_text="tokens").wait_for(timeout=60_000)
    page.click("#clear")
    assert page.locator("#send").is_visible()
    assert page.locator(".user, .assistant").count() == 0
    server.wait_idle(10)
    greedy(page)
    page.fill("#input", PROBLEM)
    page.keyboard.press("Enter")
    page.locator("#send").wait_for(state="hidden")
    page.locator("#send").wait_for(state="visible", timeout=60_000)
    assert [message["content"] for message in bodies[-1]["messages"]] == [PROBLEM]
    assert page.locator(".user").all_inner_texts() == [PROBLEM]
    assert ANSWER in page.locator(".answer").inner_text()
    page.fill("#input", "And again?")
    page.keyboard.press("Enter")
    page.locator("#send").wait_for(state="hidden")
    assert [message["content"] for message in bodies[-1]["messages"]][::2] == [PROBLEM, "And again?"]
    page.locator("#send").wait_for(state="visible", timeout=60_000)


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("pieces", [
    ["\n\n", "\n\nThe", " end"], ["<think>", "\n\n", "\nhm", "\n", "</think>", "\n\n", "\nThe", " end"],
    ["<think>", "\n\n", "</think>", "\n\n", "The", " end"], ["  \n", "The end"], ["The end"],
])  # fmt: skip
def test_no_answer_begins_with_empty_lines(page, drafts, pieces):
    page.set_checked("#drafts", drafts)
    answer, thought = page.evaluate("""(pieces) => {
        const a = new Answer();
        document.getElementById('log').append(a.element);
        for (const text of pieces) a.add({ delta: { content: text }, tokens: [{ text, accepted_draft: false }] });
        a.finish();
        return [a.text.textContent, a.thinkText.textContent];
    }""", pieces)  # fmt: skip
    assert answer == "The end"
    assert thought.strip("\n") == ("hm" if "\nhm" in pieces else "") and not thought.startswith("\n")


def test_in_chinese_by_keyboard(page):
    page.locator("#language").focus()
    page.keyboard.press("Enter")
    assert page.locator("#send").inner_text() == "发送"
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    greedy(page)
    page.locator("#examples button").first.focus()
    page.keyboard.press("Enter")
    page.locator("#send").wait_for(state="hidden")
    page.locator("#send").wait_for(state="visible", timeout=60_000)
    assert "314" in page.locator(".answer").inner_text()
    assert "思考了" in page.locator("summary").inner_text()


def test_the_boxed_directive_and_the_controls_reach_the_server(page):
    bodies = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if r.url.endswith("completions") else None)
    page.click("#toggle")
    for name, value in (("temperature", "0.7"), ("top_p", "0.9"), ("top_k", "5"), ("max_tokens", "12"), ("seed", "3"),
                        ("relaxed_topk", "4"), ("relaxed_delta", "0.25")):  # fmt: skip
        page.fill(f"#{name}", value)
    page.click("#toggle")
    page.check("#boxed")
    page.fill("#input", "What is 2 + 2?")
    page.keyboard.press("Enter")
    page.locator("#send").wait_for(state="hidden")
    page.locator("#send").wait_for(state="visible", timeout=60_000)
    (body,) = bodies
    assert body["messages"][0]["content"].endswith("put your final answer within \\boxed{}.")
    chosen = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_tokens": 12, "seed": 3, "relaxed_acceptance": True,
              "relaxed_topk": 4, "relaxed_delta": 0.25}  # fmt: skip
    assert chosen.items() <= body.items()


MARKDOWN = r"""## Roots

The roots of $x^2 - 5x + 6 = 0$ are \(x = \frac{5 \pm \sqrt{25 - 24}}{2}\), **2** and *3*:

$$\sum_{k=1}^{n} k = \frac{n(n+1)}{2}$$

1. first `code`
2. second

| a | b |
|---|---|
| 1 | 2 |

```python
print("<b>not bold</b>")
```

<script>alert(1)</script> \boxed{\{2, 3\}}"""


def test_markdown_code_and_latex_are_rendered_and_html_is_not(page):
    html = page.evaluate("(text) => { const d = document.createElement('div'); d.append(...markdown(text));"
                         " document.getElementById('log').append(d); return d.innerHTML; }", MARKDOWN)  # fmt: skip
    for tag in ("<h4>", "<strong>2</strong>", "<em>3</em>", "<mfrac>", "<msqrt>", "<munderover>", "<ol", "<table>",
                "<pre><code", "&lt;script&gt;", "&lt;b&gt;", 'class="boxed"'):  # fmt: skip
        assert tag in html.replace(' data-language="python"', ""), tag
    assert "<script>" not in html


def test_the_api_page(browser, server):
    page = browser.new_page()
    wrong: list[str] = []
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("request", lambda r: None if r.url.startswith((server.url, "data:")) else wrong.append(r.url))
    page.goto(f"{server.url}/docs")
    page.wait_for_selector("#types details")
    assert "/v1/chat/completions" in page.locator("#paths").inner_text()
    assert wrong == []
    page.close()


def test_the_pages_forbid_everything_from_outside(server):
    for path in ("/", "/docs"):
        response = httpx.get(f"{server.url}{path}")
        assert response.headers["content-security-policy"].startswith("default-src 'none'; script-src 'sha256-")
        assert not re.search(r"(src|href)=\"https?:", response.text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("device", "width", "height"), [("desktop", 1280, 800), ("phone", 390, 844)])
def test_screens(browser, server, scheme, device, width, height):
    """No sideways scrolling on any screen. With PLAYGROUND_SCREENSHOTS=1 the documents' pictures are made anew."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, locale="en-GB")
    page = context.new_page()
    page.goto(server.url)
    page.locator("#model:not(:empty)").wait_for(state="attached")
    greedy(page)
    page.check("#boxed")
    for problem in ("Max has 97 apples. Max gives 2 to Tom and 31 to a friend. How many apples are left?", PROBLEM):
        page.fill("#input", problem)
        page.click("#send")
        page.locator("#send").wait_for(state="hidden")
        page.locator("#send").wait_for(state="visible", timeout=60_000)
    page.check("#drafts")
    page.locator("details.think summary").last.click()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    if os.environ.get("PLAYGROUND_SCREENSHOTS"):
        page.evaluate("document.getElementById('log').scrollTop = 1e6")
        IMAGES.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=IMAGES / f"playground-{device}-{scheme}.png")
    context.close()
