"""A tokenizer as Kimi K2 and Moonlight publish theirs: ranks, code with the pattern, no tokenizer.json."""

import base64
import json
from pathlib import Path

# The alternatives of Kimi K2's and Moonlight's pattern.
KIMI = (
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)
BYTES = [bytes([byte]) for byte in range(256)]
TEMPLATE = "{% for m in messages %}<|im_{{ m['role'] }}|>{{ m['content'] }}<|im_end|>{% endfor %}<|im_assistant|>"


def write_tiktoken(folder: Path, tokens: list[bytes], name: str = "tiktoken.model") -> int:
    """Write the files; `tokens` by rank. Returns the first id behind the ranks."""
    first = len(tokens)
    (folder / name).write_text("".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens)))
    alternatives = "".join(f'            r"""{part}""",\n' for part in KIMI)
    (folder / "tokenization_kimi.py").write_text(
        "import nothing_that_is_installed\n\n\nclass TikTokenTokenizer:\n    num_reserved_special_tokens = 256\n"
        f'    pat_str = "|".join(\n        [\n{alternatives}        ]\n    )\n'
    )
    named = {0: ("[BOS]", True), 1: ("[EOS]", True), 2: ("<|im_end|>", True), 10: ("<|tool_call_begin|>", False),
             11: ("<|im_user|>", True), 12: ("<|im_assistant|>", True)}  # fmt: skip
    settings = {
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "chat_template": TEMPLATE,
        "added_tokens_decoder": {
            str(first + at): {"content": text, "special": special} for at, (text, special) in named.items()
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": first + 2}))
    return first
