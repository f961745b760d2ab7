"""What an operator chooses is checked before a model is loaded, and a mistake names the flag, the file and the line."""

import math

import pytest

from deepseek_fp4_plugin.cli import app
from deepseek_fp4_plugin.serving.options import ServerOptions


@pytest.mark.parametrize("name", ["body_timeout", "request_timeout", "stall_timeout", "drain_timeout"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e12, 1e308])
def test_seconds_that_mean_nothing(name, value):
    with pytest.raises(ValueError, match=rf"{name} is .*; give seconds above 0, at most 2000000"):
        ServerOptions(**{name: value})
    assert getattr(ServerOptions(**{name: 2_000_000}), name) == 2_000_000


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", -1), ("port", 65536), ("max_queue", -1), ("max_queue", 10**30), ("max_body_bytes", 0),
     ("max_body_bytes", 10**30), ("max_queue", True), ("max_queue", 1.5)],
)  # fmt: skip
def test_counts_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*; give a whole number from"):
        ServerOptions(**{name: value})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"host": ""}, "host is ''"),
        ({"host": " localhost"}, "host is ' localhost'"),
        ({"api_keys": ("fine", "schlüssel")}, "API key 2"),
        ({"api_keys": ("two words",)}, "API key 1"),
        ({"api_keys": ("\ufeffkey",)}, "API key 1"),
        ({"api_keys": ("",)}, "API key 1"),
        ({"served_model_name": ("",)}, "served_model_name is empty"),
        ({"allowed_origins": ("example.org",)}, "allowed_origin is 'example.org'"),
        ({"allowed_origins": ("https://example.org/path",)}, "allowed_origin is"),
        ({"sampling_defaults": "other"}, "choose model or openai"),
    ],
)
def test_texts_that_cannot_be_meant(fields, said):
    with pytest.raises(ValueError, match=said):
        ServerOptions(**fields)
    ServerOptions(host="::1", api_keys=("k!~",), allowed_origins=("*", "https://a.example:8443"))


def refused(capsys, *arguments: str) -> str:
    assert app.run(["serve", "r1_nano", *arguments]) in (1, 2)
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "Traceback" not in error
    return error


@pytest.mark.parametrize("flag", ["--chat_template", "--api_key_file", "--config"])
def test_a_file_that_cannot_be_read_is_named_with_its_flag(capsys, tmp_path, flag):
    path = tmp_path / "given"
    path.write_bytes(b"caf\xe9\n")
    assert f"{path} cannot be read: it is not UTF-8" in refused(capsys, flag, str(path))
    assert "cannot be read: " in refused(capsys, flag, str(tmp_path / "absent"))
    assert "cannot be read: " in refused(capsys, flag, str(tmp_path))


def test_the_line_of_a_wrong_key_is_named(capsys, tmp_path):
    path = tmp_path / "keys"
    path.write_text("good\n\nschlüssel\n", encoding="utf-8")
    assert f"{path}, line 3: a key is printable ASCII" in refused(capsys, "--api_key_file", str(path))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--request_timeout", "nan"), "request_timeout is nan"),
        (("--drain_timeout", "inf"), "drain_timeout is inf"),
        (("--stall_timeout", "1e12"), "stall_timeout is"),
        (("--max_queue", "99999999999999999999"), "max_queue is 99999999999999999999"),
        (("--max_batch_size", "99999999999999999999"), "max_batch_size=99999999999999999999 must be at most"),
        (("--max_num_tokens", "0"), "max_num_tokens=0 must be at least 1"),
        (("--kv_cache_free_gpu_memory_fraction", "nan"), "free_gpu_memory_fraction=nan must be a finite number"),
        (("--port", "65536"), "65536"),
        (("--port", "http"), "http"),
        (("--host", "a" * 300), "cannot listen on"),
        (("--host", "no.such.host.invalid"), "cannot listen on no.such.host.invalid:8000"),
        (("--served_model_name", ""), "served_model_name is empty"),
    ],
)
def test_mistakes_on_the_command_line(capsys, arguments, said):
    assert said in refused(capsys, *arguments)


def test_a_key_for_chat_is_checked_too(capsys, tmp_path):
    path = tmp_path / "key"
    for content in (b"\n", "schlüssel\n".encode(), b"\xff\n"):
        path.write_bytes(content)
        assert app.run(["chat", "--url", "http://localhost:1", "--api-key-file", str(path)]) == 1
        error = capsys.readouterr().err
        assert str(path) in error and "Traceback" not in error
