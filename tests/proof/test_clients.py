"""Ten clients against a real server, each in an environment of its own: the table of docs/serving.md, cell by cell.

What each does stands in clients/with_NAME.py. Their pins contradict each other's and ours, so every client gets an
environment from the package index.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.server_process import running_server
from tests.proof.clients.run import FEATURES

FOLDER = Path(__file__).parent / "clients"
TABLE = Path(__file__).parents[2] / "docs" / "serving.md"
CLIENTS = {
    "openai": ["openai==3.57.0"],
    "anthropic": ["anthropic==2.14.0"],
    "langchain": ["langchain-openai==1.7.4", "langchain-anthropic==1.7.10"],
    "agents": ["openai-agents==0.24.0"],
    "pydantic_ai": ["pydantic-ai-slim[openai,anthropic]==2.68.0"],
    "litellm": ["litellm==1.110.2"],
    "instructor": ["instructor==1.17.0"],
    "autogen": ["autogen-ext[openai]==0.7.5", "autogen-agentchat==0.7.5"],
    "smolagents": ["smolagents[openai]==1.26.0"],
    "llama_index": ["llama-index-llms-openai-like==0.8.1"],
}
pytestmark = pytest.mark.proof


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    (folder / "keys").write_text("secret\n")
    # In FP32 a step takes long enough for the pieces of a stream not to gather on a busy machine.
    arguments = ["--mtp", "3", "--max_batch_size", "8", "--max_seq_len", "8192", "--tool_parser", "deepseek_v3",
                 "--reasoning_parser", "deepseek-r1-0528", "--api_key_file", "keys", "--dtype", "float32"]  # fmt: skip
    with running_server(folder, *arguments) as running:
        yield running


@pytest.fixture(scope="module")
def outcome(server, tmp_path_factory):
    """outcome(client): what went wrong with each of its features, or None; a client is installed and run once."""

    @functools.cache
    def run(client: str) -> dict[str, str | None]:
        folder = tmp_path_factory.mktemp(client)
        python = str(folder / "bin" / "python")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = subprocess.run([python, "-m", "pip", "install", "-q", *CLIENTS[client]], capture_output=True, text=True)
        if pip.returncode:
            pytest.skip(f"{client} cannot be installed here: {pip.stderr.strip().splitlines()[-1]}")
        offline = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [python, str(FOLDER / "run.py"), client, server.url, server.name]
        done = subprocess.run(command, capture_output=True, text=True, env=offline, cwd=folder, timeout=900)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"feature"')]
        return {line["feature"]: line["wrong"] for line in lines}

    return run


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("feature", FEATURES)
def test_a_cell_of_the_table(outcome, client, feature):
    wrong = outcome(client)[feature]
    assert wrong is None, wrong


def test_the_table_has_these_clients_and_a_yes_in_every_cell():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.read_text().splitlines()
            if re.search(r"==[0-9]", line)]  # fmt: skip
    assert [row[1].split(", ") for row in rows] == [[f"`{package}`" for package in CLIENTS[c]] for c in CLIENTS]
    assert all(len(row) == 2 + len(FEATURES) and all(cell.startswith("yes") for cell in row[2:]) for row in rows)
