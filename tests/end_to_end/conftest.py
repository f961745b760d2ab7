"""Servers that several files share, started once a session."""

import pytest

from tests.end_to_end.server_process import running_server


@pytest.fixture(scope="session")
def parsing_server(tmp_path_factory):
    """r1_nano with both parsers, as a client's server has them."""
    arguments = ["--max_batch_size", "16", "--max_seq_len", "2048", "--tool_parser", "deepseek_v3",
                 "--reasoning_parser", "deepseek-r1-0528", "--vllm_metrics"]  # fmt: skip
    with running_server(tmp_path_factory.mktemp("clients"), *arguments) as running:
        yield running
