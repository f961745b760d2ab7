"""Tokens as OpenAI's responses show them: texts, bytes, log-probabilities, and which were accepted drafts."""

import codecs
from collections.abc import Sequence
from typing import Any

from deepseek_fp4_plugin.engine.step_plan import Logprob
from deepseek_fp4_plugin.tokenizer import Tokenizer

LogprobTable = Sequence[dict[int, Logprob]]  # for each token: itself and the best, by id

# JSON has no -inf. A banned token's log-probability is written as this, below what FP32 softmax can give.
_MINUS_INFINITY = -9999.0


class TokenTexts:
    """Texts and bytes of single tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def text(self, token: int) -> str:
        """The token's text; bytes that are no text by themselves as `bytes:\\xe4\\xb8`, as OpenAI writes them."""
        raw = self.tokenizer.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.tokenizer.token_bytes(token)
        return {"token": self.text(token), "logprob": _finite(logprob), "bytes": list(raw)}

    def chat_logprobs(self, ids: Sequence[int], logprobs: LogprobTable, top: int) -> list[dict[str, Any]]:
        """`logprobs.content` of a chat choice."""
        content = []
        for token, table in zip(ids, logprobs, strict=False):
            entry = self._entry(token, table[token].logprob)
            entry["top_logprobs"] = [self._entry(t, table[t].logprob) for t in _best(table, top)]
            content.append(entry)
        return content

    def completion_logprobs(
        self, ids: Sequence[int], logprobs: Sequence[dict[int, Logprob] | None], top: int, offset: int = 0
    ) -> dict[str, Any]:
        """The four lists of a plain completion. A first prompt token, which nothing predicts, has None."""
        texts = [self.text(token) for token in ids]
        tables = [None] * (len(ids) - len(logprobs)) + list(logprobs)
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [
                None if table is None else _finite(table[token].logprob)
                for token, table in zip(ids, tables, strict=True)
            ],
            "top_logprobs": [
                None if table is None else {self.text(t): _finite(table[t].logprob) for t in _best(table, top)}
                for table in tables
            ],
            "text_offset": offsets,
        }

    def prompt_logprobs(
        self, ids: Sequence[int], logprobs: Sequence[dict[int, Logprob] | None] | None, top: int
    ) -> list[dict[str, Any] | None]:
        """For each prompt token, by token id: itself and the `top` best. None for the first."""
        tables = [None] * (len(ids) - len(logprobs or [])) + list(logprobs or [])
        return [
            None if table is None else {str(t): self._entry(t, table[t].logprob) for t in {token, *_best(table, top)}}
            for token, table in zip(ids, tables, strict=True)
        ]

    def drafted(self, ids: Sequence[int], accepted: Sequence[bool], skip_special: bool) -> list[dict[str, Any]]:
        """Each token's text and whether it was an accepted draft."""
        return DraftedTokens(self.tokenizer, skip_special).feed(ids, accepted, last=True)


class DraftedTokens:
    """Token texts of one choice as they come; a character of several tokens belongs to its last."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Sequence[int], accepted: Sequence[bool], last: bool) -> list[dict[str, Any]]:
        """Tokens that the answer's text leaves out have no text here either."""
        entries = []
        for number, (token, draft) in enumerate(zip(ids, accepted, strict=True)):
            left_out = self._skip and self._tokenizer.is_special(token)
            raw = b"" if left_out else self._tokenizer.token_bytes(token)
            text = self._decoder.decode(raw, last and number == len(ids) - 1)
            entries.append({"text": text, "accepted_draft": draft})
        return entries


def _best(table: dict[int, Logprob], top: int) -> list[int]:
    return sorted(table, key=lambda token: table[token].rank)[:top]


def _finite(logprob: float) -> float:
    return max(logprob, _MINUS_INFINITY)
