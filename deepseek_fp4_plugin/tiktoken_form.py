"""A tokenizer in tiktoken's form (Kimi K2, Moonlight) as one of the `tokenizers` library.

Such a folder has a file of ranks (a line a token: its bytes in base64 and its rank, which is its id) and a
`tokenization_*.py` with the pattern that cuts a text into words. That file's constants are read as text; no code of a
checkpoint is run. tiktoken joins two neighbours where their bytes together are a token, the lowest rank first, so the
merges of byte-pair encoding follow from the ranks.
"""

import ast
import base64
import binascii
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

RANKS_NAMES = ("tiktoken.model", "tokenizer.model")
_RESERVED = 256  # ids behind the ranks, where the code does not say how many


def read_tiktoken(
    folder: Path, settings: Mapping[str, Any], symbols: Callable[[bytes], str]
) -> tokenizers.Tokenizer | None:
    """The tokenizer of a folder that has one in this form, None for a folder that has none.

    settings: tokenizer_config.json, whose added_tokens_decoder names the ids behind the ranks.  symbols: the printable
    symbols of a byte-level vocabulary.  Raises ValueError naming the file that cannot be used.
    """
    path = next((folder / name for name in RANKS_NAMES if (folder / name).is_file()), None)
    ranks = _ranks(path) if path else None
    if path is None or ranks is None:
        return None
    constants = _constants(folder)
    pattern = constants.get("pat_str")
    if not isinstance(pattern, str):
        raise ValueError(
            f"{path} is a tiktoken model, and no tokenization_*.py beside it says its pattern (pat_str); copy that "
            "file from the original checkpoint, or convert the tokenizer to tokenizer.json (transformers can)"
        )
    try:
        words = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"pat_str of {folder}/tokenization_*.py cannot be used: {error}") from None
    vocabulary = {symbols(token): rank for token, rank in ranks.items()}
    merges = [(symbols(left), symbols(right)) for left, right in _merges(ranks)]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    reserved = constants.get("num_reserved_special_tokens")
    _add_reserved(backend, settings, len(ranks), reserved if isinstance(reserved, int) else _RESERVED)
    return backend


def _ranks(path: Path) -> dict[bytes, int] | None:
    """Token -> rank; None for another kind of file (SentencePiece's `tokenizer.model` is binary)."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        parts = line.split()
        if not parts:
            continue
        try:
            token, rank = parts
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            if not ranks:
                return None
            raise ValueError(f"line {number} of {path} is not a token in base64 and its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path} does not give its {len(ranks)} tokens the ranks 0 to {len(ranks) - 1}")
    return ranks


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that makes a token, by that token's rank."""
    found = []
    for token, rank in ranks.items():
        for at in range(1, len(token)):
            left, right = ranks.get(token[:at]), ranks.get(token[at:])
            if left is not None and right is not None:
                found.append((rank, left, right, token, at))
    return [(token[:at], token[at:]) for _, _, _, token, at in sorted(found)]


def _constants(folder: Path) -> dict[str, Any]:
    """The constants that tokenization_*.py assigns anywhere, of literals and of `"...".join` over literals."""
    constants: dict[str, Any] = {}
    for path in sorted(folder.glob("tokenization_*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                constants.setdefault(node.targets[0].id, _value(node.value))
    return constants


def _value(node: ast.expr) -> Any:
    try:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
            return ast.literal_eval(node.func.value).join(ast.literal_eval(node.args[0]))
        return ast.literal_eval(node)
    except (ValueError, TypeError, AttributeError, IndexError):
        return None


def _add_reserved(backend: tokenizers.Tokenizer, settings: Mapping[str, Any], first: int, count: int) -> None:
    """The ids behind the ranks, named by the settings or `<|reserved_token_ID|>`, up to the last that has a name."""
    declared = settings.get("added_tokens_decoder") or {}
    fields = {int(index): entry for index, entry in declared.items()} if isinstance(declared, Mapping) else {}
    for index in range(first, max(first + count, 1 + max(fields, default=0))):
        entry = fields.get(index, {})
        text, special = entry.get("content", f"<|reserved_token_{index}|>"), entry.get("special", True)
        token = tokenizers.AddedToken(text, special=special, normalized=False)
        (backend.add_special_tokens if special else backend.add_tokens)([token])
