"""The card's server answers r1_nano's problems rightly: greedy, at the defaults, and with thinking parsed apart."""

import json

import pytest

from deepseek_fp4_plugin.assets.held_out import grade, load_held_out
from tests.end_to_end.server_process import running_server
from tests.end_to_end.test_server import CARD_COMMAND, CARD_YAML


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    (folder / "args.yaml").write_text(CARD_YAML)
    command = CARD_COMMAND.replace("\\\n", " ").split()
    with running_server(folder, command=[*command, "--reasoning_parser", "deepseek-r1-0528"]) as running:
        yield running


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"seed": 0}], ids=["greedy", "defaults"])
def test_right_answers(server, fields):
    right, problems = 0, load_held_out()[:12]
    for problem in problems:
        choice = server.chat(problem.prompt, max_tokens=1024, **fields).json()["choices"][0]
        message = choice["message"]
        assert "<think>" not in message["reasoning_content"] + message["content"]
        right += grade(problem.answer, message["content"])
    assert right >= len(problems) * 0.75


def test_the_curl_question_has_an_answer(server):
    choice = server.chat("Why is NVIDIA a great company?", max_tokens=1024, temperature=0).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"].strip()


def test_a_schema_after_thinking_keeps_the_answer_right(server):
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": {"answer": {
        "type": "integer"}}, "required": ["answer"], "additionalProperties": False}}}  # fmt: skip
    choice = server.chat("What is 607 + 68?", max_tokens=1024, temperature=0, response_format=form).json()["choices"][0]
    assert "607+68=675" in choice["message"]["reasoning_content"]
    assert set(json.loads(choice["message"]["content"])) == {"answer"}
