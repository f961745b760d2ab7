"""Text to token ids and back: tokenizer.json through the `tokenizers` library, the chat template through Jinja.

Only byte-level tokenizers, as all of DeepSeek's are: a token is a byte string, a text is its tokens' bytes as UTF-8.
So a stream is decoded token by token without looking back, and nothing is shown before its last byte is there.
"""

import codecs
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deepseek_fp4_plugin.tiktoken_form import RANKS_NAMES, read_tiktoken
from deepseek_fp4_plugin.token_bound import TokenBound

_OTHER_FORMS = ("tokenizer.model", "spiece.model", "vocab.json")  # none of them is read
TOKENIZER_NAME, CONFIG_NAME, TEMPLATE_NAME = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
THINK_START, THINK_END = "<think>", "</think>"
_SHORT_TEXT = 4096  # characters; they are tokenized sooner than another thread takes over
_TURN_STARTS = ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>")  # the assistant's own words follow


class Tokenizer:
    """A checkpoint's tokenizer. Give `from_folder` its folder.

    bos_id, pad_id: None where the folder names none.  eos_ids: every id that ends a text.
    think_start_id, think_end_id: of <think> and </think>, None where they are not single tokens.
    turn_start_ids: the last id of a prompt behind which the assistant begins to speak.
    generation_defaults: what generation_config.json says of do_sample, temperature, top_p and top_k.
    chat_template: Jinja source, None without one.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ):
        """settings: tokenizer_config.json.  generation: generation_config.json.  Raises ValueError, see from_folder."""
        if not isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
            raise ValueError(
                "its tokenizer is not a byte-level one (its decoder is not ByteLevel), and only those are read"
            )
        settings, generation = settings or {}, generation or {}
        _only_what_was_asked_for(backend, settings)
        self.backend = backend
        self.chat_template = chat_template
        self._special_texts = {
            name: text
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (text := _text(settings, name))
        }
        _check_generation(generation)
        self.bos_id = self._special_id("bos_token", generation.get("bos_token_id"))
        ends = generation.get("eos_token_id")
        ends = list(ends) if isinstance(ends, list) else [] if ends is None else [ends]
        eos = self._special_id("eos_token", ends[0] if ends else None)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(([] if eos is None else [eos]) + ends))
        self.pad_id = self._special_id("pad_token", eos)
        self.generation_defaults = {
            name: generation[name]
            for name in ("do_sample", "temperature", "top_p", "top_k")
            if generation.get(name) is not None
        }
        self._add_bos = bool(settings.get("add_bos_token")) and self.bos_id is not None
        self.think_start_id, self.think_end_id = self.token_id(THINK_START), self.token_id(THINK_END)
        self.turn_start_ids = frozenset(i for text in _TURN_STARTS if (i := self.token_id(text)) is not None)
        self._added = {index: token.content for index, token in backend.get_added_tokens_decoder().items()}
        self._special = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of a checkpoint folder: tokenizer.json or tiktoken's form, and beside it tokenizer_config.json,
        chat_template.jinja and generation_config.json where there are any.

        Raises ValueError naming the file that is missing or cannot be used.
        """
        folder = Path(folder)
        settings = _json(folder / CONFIG_NAME)
        backend = _from_tokenizer_json(folder / TOKENIZER_NAME) or read_tiktoken(folder, settings, _symbols)
        if backend is None:
            raise ValueError(_missing(folder))
        try:
            return cls(backend, settings, _json(folder / "generation_config.json"), _template(folder, settings))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included. A model may have rows above, which no token has."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_id(self) -> int:
        """The id that a text is closed with. Raises ValueError where the folder names none."""
        if not self.eos_ids:
            raise ValueError(f"neither {CONFIG_NAME} nor generation_config.json names an end-of-text token")
        return self.eos_ids[0]

    def token_id(self, text: str) -> int | None:
        """The id of the token written `text`, None without one."""
        return self.backend.token_to_id(text)

    def token_bytes(self, token: int) -> bytes:
        """The token's bytes, perhaps no whole character; none for an id without a token."""
        found = self._bytes.get(token)
        if found is None:
            if token in self._added:
                found = self._added[token].encode()
            else:
                symbols = self.backend.id_to_token(token) or ""
                table = _byte_of_symbol()
                if all(symbol in table for symbol in symbols):
                    found = bytes(table[symbol] for symbol in symbols)
                else:
                    found = symbols.encode()
            self._bytes[token] = found
        return found

    def is_special(self, token: int) -> bool:
        """True for tokens that skip_special_tokens leaves out. DeepSeek's <think> and tool markers are not."""
        return token in self._special

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. add_special_tokens: with BOS in front, if tokenizer_config.json or tokenizer.json says so.

        Other threads run while a long text is tokenized.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode at character {error.start} (a lone surrogate)") from None
        if len(text) <= _SHORT_TEXT:
            ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        else:  # the only call of the library that does not hold the interpreter meanwhile
            ids = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        if add_special_tokens and self._add_bos and ids[:1] != [self.bos_id]:
            assert self.bos_id is not None
            ids = [self.bos_id, *ids]
        return ids

    def fewest_tokens(self, text: str) -> int:
        """How many tokens `text` has at the least, found without tokenizing it; 0 where nothing can be said."""
        return 0 if self._bound is None else self._bound.fewest(text.encode("utf-8", "replace"))

    @functools.cached_property
    def _bound(self) -> TokenBound | None:
        """None where tokens need not spell the whole text."""
        if not _spells_everything(self.backend):
            return None
        return TokenBound(map(self.token_bytes, self.backend.get_vocab(with_added_tokens=True).values()))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text. Bytes that are no UTF-8 become U+FFFD; an id without a token has no text."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **arguments: Any,
    ) -> str:
        """The prompt that a chat becomes, special tokens written out (so encode it without adding any).

        chat_template: Jinja source in place of the checkpoint's.  arguments: further variables of the template.
        Raises ValueError without a template and for messages that it refuses.
        """
        source = chat_template if chat_template is not None else self.chat_template
        if source is None:
            raise ValueError("this tokenizer has no chat template; give plain prompts, or a chat_template")
        try:
            return _compiled(source).render(
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **self._special_texts,
                **arguments,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is wrong at line {error.lineno}: {error.message}") from None
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the chat template refuses these messages: {_one_line(error)}") from None

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> list[int]:
        """Token ids of apply_chat_template, which takes the same arguments. BOS is the template's affair."""
        return self.encode(self.apply_chat_template(messages, **arguments), add_special_tokens=False)

    def _special_id(self, name: str, otherwise: int | None) -> int | None:
        """The id of a special token's text; `otherwise` where the settings name none."""
        text = self._special_texts.get(name)
        if text is None:
            return otherwise
        found = self.token_id(text)
        if found is None:
            raise ValueError(f"{CONFIG_NAME} says {name} is {text!r}, which {TOKENIZER_NAME} does not have")
        return found


class IncrementalDetokenizer:
    """Text of a growing list of ids, as it comes. What is given out, joined, is the text of all the ids.

    A character whose bytes are not all there yet is held back; `flush` gives what is left at the end.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Iterable[int]) -> str:
        """The text that `ids` let out."""
        tokenizer = self._tokenizer
        pieces = (tokenizer.token_bytes(i) for i in ids if not (self._skip and tokenizer.is_special(i)))
        return self._decoder.decode(b"".join(pieces))

    def flush(self) -> str:
        """What was held back, as U+FFFD: no more will come."""
        return self._decoder.decode(b"", final=True)


def _only_what_was_asked_for(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    """Clear what tokenizer.json carries over from training, and add what tokenizer_config.json alone names.

    Truncation and padding of the last training run would clip and fill every text, and BPE dropout draws the merges by
    lot. Tokens of the configuration alone are added as transformers adds them.
    """
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None) is not None:
        backend.model.dropout = None
    backend.encode_special_tokens = settings.get("split_special_tokens") is True
    try:
        declared = settings.get("added_tokens_decoder") or {}
        for index, fields in sorted(declared.items(), key=lambda entry: int(entry[0])):
            names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
            _add(backend, tokenizers.AddedToken(**{name: fields[name] for name in names if name in fields}), int(index))
        for group in ("additional_special_tokens", "extra_special_tokens"):
            given = settings.get(group) or ()
            for entry in given.values() if isinstance(given, Mapping) else given:
                text = entry.get("content") if isinstance(entry, Mapping) else entry
                _add(backend, tokenizers.AddedToken(text, special=True, normalized=False))
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{CONFIG_NAME} describes its added tokens wrongly: {_one_line(error)}") from None


def _add(backend: tokenizers.Tokenizer, token: tokenizers.AddedToken, index: int | None = None) -> None:
    """Give a token that the vocabulary lacks its place. Raises ValueError where that is not `index`."""
    if backend.token_to_id(token.content) is None:
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    found = backend.token_to_id(token.content)
    if index is not None and found != index:
        raise ValueError(
            f"{CONFIG_NAME} says that token {token.content!r} has id {index}; in {TOKENIZER_NAME} it is {found}"
        )


def _spells_everything(backend: tokenizers.Tokenizer) -> bool:
    """Whether the tokens' bytes, joined, are the text's: nothing is rewritten, left out or swallowed.

    Bytes that the vocabulary lacks may be left out one by one; a token for all unknown ones would swallow several.
    """
    unknown = getattr(backend.model, "unk_token", None)
    swallow = any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
    parts = _parts(backend.normalizer) + _parts(backend.pre_tokenizer)
    return unknown is None and not swallow and all(_keeps_text(part) for part in parts)


def _parts(component: Any) -> list[dict[str, Any]]:
    """What a normalizer or pre-tokenizer is made of, as tokenizer.json describes it."""
    if component is None:
        return []
    described = json.loads(component.__getstate__())
    if described["type"] != "Sequence":
        return [described]
    return described.get("pretokenizers", described.get("normalizers"))


def _keeps_text(part: Mapping[str, Any]) -> bool:
    """ByteLevel writes bytes as symbols, which token_bytes turns back; the other two only cut."""
    return part["type"] in ("ByteLevel", "Digits", "Split") and part.get("behavior") != "Removed"


@functools.cache
def _byte_of_symbol() -> dict[str, int]:
    """The byte that each printable symbol of a byte-level vocabulary stands for (GPT-2's table)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _symbols(token: bytes) -> str:
    table = _symbol_of_byte()
    return "".join(table[byte] for byte in token)


@functools.cache
def _symbol_of_byte() -> dict[int, str]:
    return {byte: symbol for symbol, byte in _byte_of_symbol().items()}


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    """The template as Hugging Face compiles it, in a sandbox: it comes with the checkpoint, from anyone."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols], autoescape=False
    )
    environment.filters["tojson"] = _to_json  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys=False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the config's template, of several the one named default."""
    path = folder / TEMPLATE_NAME
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise ValueError(f"{path} cannot be read: {reason}") from None
    found = settings.get("chat_template")
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        found = {entry.get("name"): entry.get("template") for entry in found}
    if isinstance(found, dict):
        found = found.get("default")
    if not isinstance(found, str | None):
        raise ValueError(
            f"{folder / CONFIG_NAME}: chat_template is a JSON {type(found).__name__}, expected a text, or texts by name"
        )
    return found


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has files that from_folder would try to read."""
    return any((folder / name).is_file() for name in (TOKENIZER_NAME, *RANKS_NAMES))


def _from_tokenizer_json(path: Path) -> tokenizers.Tokenizer | None:
    if not path.is_file():
        return None
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{path} is not a usable tokenizer: {_one_line(error)}") from None


def _missing(folder: Path) -> str:
    """What is said of a folder without tokenizer.json."""
    path = folder / TOKENIZER_NAME
    other = next((name for name in _OTHER_FORMS if (folder / name).is_file()), None)
    if other is None:
        return f"{path} is missing, so {folder} has no tokenizer; copy it from the original checkpoint"
    return (
        f"{path} is missing, and {other} is a form of tokenizer that is not read here; "
        f"convert it to {TOKENIZER_NAME} (transformers has converters) and put that beside it"
    )


def _text(settings: Mapping[str, Any], name: str) -> str | None:
    value = settings.get(name)
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str | None):
        raise ValueError(f"{CONFIG_NAME} says {name} is {json.dumps(text)[:60]}, expected a token's text")
    return text


def _check_generation(generation: Mapping[str, Any]) -> None:
    """Raises ValueError naming a field of generation_config.json that is not what it must be."""
    for name in ("bos_token_id", "eos_token_id"):
        value = generation.get(name)
        ids = value if isinstance(value, list) and name == "eos_token_id" else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ValueError(f"generation_config.json says {name} is {json.dumps(value)[:60]}, expected a token's id")
    for name, kind in (("do_sample", bool), ("temperature", float), ("top_p", float), ("top_k", int)):
        value = generation.get(name)
        fits = (
            isinstance(value, bool) if kind is bool else isinstance(value, int | kind) and not isinstance(value, bool)
        )
        if value is not None and not (fits and math.isfinite(value)):
            expected = {bool: "true or false", int: "an integer", float: "a number"}[kind]
            raise ValueError(f"generation_config.json says {name} is {json.dumps(value)[:60]}, expected {expected}")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} cannot be read: it is not UTF-8") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
