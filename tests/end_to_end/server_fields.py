"""A server for the request fields' tests, what they ask of it, and which fields they have shown."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.end_to_end.server_process import Server, running_server

MTP = """
speculative_config:
  decoding_type: MTP
  num_nextn_predict_layers: 3
  use_relaxed_acceptance_for_thinking: true
  relaxed_topk: 10
  relaxed_delta: 0.6
"""
covered: set[str] = set()


@contextmanager
def speculating_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "args.yaml").write_text(MTP)
    arguments = ["--max_batch_size", "4", "--max_num_tokens", "512", "--max_seq_len", "2048",
                 "--extra_llm_api_options", "args.yaml", "--tool_parser", "deepseek_v3"]  # fmt: skip
    with running_server(folder, *arguments) as running:
        yield running


def field(*names: str):
    """Marks a test as the one that shows these fields to act or to be refused."""
    covered.update(names)
    return lambda test: test


def ok(response: httpx.Response) -> dict:
    assert response.status_code == 200, response.text
    return response.json()


def refused(response: httpx.Response, word: str) -> None:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert word in error["message"]
    assert error["type"] == "BadRequestError"


def text(server: Server, prompt="abc", **fields) -> str:
    return ok(server.complete(prompt, **{"temperature": 0, **fields}))["choices"][0]["text"]


def tokens(server: Server, prompt="abc", **fields) -> list[int]:
    body = ok(server.complete(prompt, return_token_ids=True, **{"temperature": 0, **fields}))
    return body["choices"][0]["token_ids"]


def ids_of(server: Server, string: str) -> list[int]:
    return ok(httpx.post(f"{server.url}/tokenize", json={"prompt": string, "add_special_tokens": False}))["tokens"]


def events(response: httpx.Response) -> list[dict]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
