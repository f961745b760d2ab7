"""The small files beside the weights: do tokenizer, chat template and config files speak of the same tokens?"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.findings import Fault, Finding, error, note, warning
from deepseek_fp4_plugin.checkpoint.json_files import read_json
from deepseek_fp4_plugin.models.declarations import absent_code
from deepseek_fp4_plugin.tokenizer import Tokenizer, has_tokenizer

_SPECIAL = re.compile(r"<｜[^｜<>]{1,40}｜>")


def examine_text_files(folder: Path, config: Mapping[str, Any]) -> list[Finding]:
    """config: the parsed config.json."""
    path, findings = folder / "tokenizer.json", _code(folder, config)
    if not path.is_file() and has_tokenizer(folder):
        try:
            Tokenizer.from_folder(folder)
        except ValueError as problem:
            return [*findings, error("tokenizer", str(problem), fault=Fault.NO_TOKENIZER)]
        return findings
    if not path.is_file():
        sentence = f"{folder} has no tokenizer.json, so that no text can be read or written with it"
        return [
            *findings,
            warning("tokenizer.json", f"{sentence}; copy it from the original", fault=Fault.NO_TOKENIZER),
        ]
    try:
        tokenizer = read_json(path)
        beside = _optional(folder / "tokenizer_config.json")
        generation = _optional(folder / "generation_config.json")
    except CheckpointError as problem:
        return [*findings, error("tokenizer", str(problem), fault=Fault.NO_TOKENIZER)]
    ids = token_ids(tokenizer)
    findings += _vocabulary(path, ids, config)
    findings += _special_tokens(folder, ids, config, beside, generation)
    findings += _saved_habits(path, tokenizer)
    return findings + _template(folder, ids, beside)


def _code(folder: Path, config: Mapping[str, Any]) -> list[Finding]:
    absent = absent_code(folder, config)
    if not absent:
        return []
    sentence = f"auto_map in {folder}/config.json names {absent[0]}, which is not there"
    return [note("auto_map", sentence, len(absent), fault=Fault.AUTO_MAP)]


def token_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id of a tokenizer.json, special and added ones included."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    for token in tokenizer.get("added_tokens") or ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            ids[str(token.get("content"))] = token["id"]
    return ids


def declared_id(ids: Mapping[str, int], beside: Mapping[str, Any], name: str) -> int | None:
    """The id of tokenizer_config.json's `eos_token` or `bos_token`."""
    token = beside.get(name)
    text = token.get("content") if isinstance(token, dict) else token
    return ids.get(text) if isinstance(text, str) else None


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _vocabulary(path: Path, ids: Mapping[str, int], config: Mapping[str, Any]) -> list[Finding]:
    size, beyond = config.get("vocab_size"), []
    if isinstance(size, int):
        beyond = sorted((number, token) for token, number in ids.items() if isinstance(number, int) and number >= size)
    if not beyond:
        return []
    number, token = beyond[0]
    sentence = (
        f"{path} has token {json.dumps(token, ensure_ascii=False)} with id {number}, and config.json's vocab_size"
    )
    return [
        error(
            "tokenizer.json",
            f"{sentence} is {size}; one of the two belongs to another model",
            len(beyond),
            fault=Fault.VOCABULARY,
        )
    ]


def _special_tokens(
    folder: Path,
    ids: Mapping[str, int],
    config: Mapping[str, Any],
    beside: Mapping[str, Any],
    generation: Mapping[str, Any],
) -> list[Finding]:
    findings = []
    for name in ("bos_token", "eos_token"):
        field, right = f"{name}_id", declared_id(ids, beside, name)
        if right is None:
            continue
        for file, content in (("config.json", config), ("generation_config.json", generation)):
            value = content.get(field)
            allowed = value if isinstance(value, list) else [value]
            if value is not None and right not in allowed:
                sentence = f"{folder}/{file}: {field} is {json.dumps(value)}, and the tokenizer's {name} has id {right}"
                findings.append(warning(f"{file} {field}", sentence, fault=Fault.SPECIAL_TOKENS))
    return findings


def _saved_habits(path: Path, tokenizer: Mapping[str, Any]) -> list[Finding]:
    saved = [name for name in ("truncation", "padding") if tokenizer.get(name)]
    if not saved:
        return []
    sentence = f"{path} holds {' and '.join(saved)} of whoever saved it; libraries that obey it cut or fill prompts"
    return [note("tokenizer.json", f"{sentence}, here it is cleared", fault=Fault.TRUNCATION)]


def _template(folder: Path, ids: Mapping[str, int], beside: Mapping[str, Any]) -> list[Finding]:
    path = folder / "chat_template.jinja"
    template = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else beside.get("chat_template")
    if isinstance(template, list):
        template = "".join(str(entry.get("template", "")) for entry in template if isinstance(entry, dict))
    if not isinstance(template, str) or not template:
        sentence = f"{folder} has no chat template; conversations cannot be put into the form the model was trained on"
        return [note("chat_template", sentence, fault=Fault.CHAT_TEMPLATE)]
    unknown = sorted({token for token in _SPECIAL.findall(template) if token not in ids})
    if not unknown:
        return []
    sentence = f"the chat template in {folder} writes {unknown[0]}, which is no token of its tokenizer"
    return [
        warning(
            "chat_template",
            f"{sentence}; one of the two belongs to another model",
            len(unknown),
            fault=Fault.CHAT_TEMPLATE,
        )
    ]
