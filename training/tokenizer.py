"""The tokenizer of r1_nano: one character a token, in the file format and with the special tokens of DeepSeek-R1.

A byte-level BPE whose only merges join the UTF-8 bytes of one character, so that text is spelled out and every byte
string still encodes. Ids: 0-2 special, 3-258 the bytes, then merged characters, then R1's markers; the rows of the
embedding above them have no token, as in R1.
"""

import json
from pathlib import Path

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT, THINK, END_THINK = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
MARKERS = (
    THINK, END_THINK, "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", USER, ASSISTANT, "<|EOT|>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)  # fmt: skip
FIRST_BYTE_ID = 3
MODEL_MAX_LENGTH = 131072

# Characters of more than one byte that get a token of their own: punctuation, then the Chinese our data is written in.
MERGED = (
    "，。？！：；、“”（）《》…—’‘×÷−·￥°"
    "一二三四五六七八九十百千万个零两几多少加减乘除以等于是得和差积商余数字计算请问结果答案为什么谁你我他她它们的了吗呢吧啊在有没不"
    "比较大小更最哪位写进借今天明昨星期日周后前月年过时分钟点秒早上午下晚好再见谢客气您叫名能做会可回也还就到从至共总现又只支本苹果"
    "书铅笔糖每买卖给吃走来去元块钱人男女孩学生老师班里字母词单中出次反转倒序排列顺升降从按照规律列填项第首末相同样先然所因此因而且"
    "但如若果则把被让用法式步骤一逐推理放最终框内帮助解题目简很模型微语言开心高兴问题知道对起抱歉无法提供闲聊英文汉说话听懂试看想要"
    "帮告诉介绍自己国家首都北京巴黎伦敦东世界地方城市水山河花鸟鱼马猫狗车船飞机红黄蓝绿白黑新旧长短快慢轻重左右间边外头手口日光雨雪"
    "春夏秋冬火木金土石田米面包饭菜茶杯桌椅门窗家校店朋友爸妈哥弟姐妹儿都别换成份些像这那样怎各合计剩下原拿走了送掉增减少另"
    "与或往之始找李王林朵鸡蛋户太例嗨向构习器阳喜欢翻译画公园股票季节足球命源发爱历史讲故事诗电影祝音乐安拜亮汽参结构专注力层"
    "借并立即需要验证确错误改空房屋牛羊鱼船衣服帽鞋桃橙瓜包盒袋排页张朵条件双杯碗"
)
_SPECIAL_TRUE = {BOS, EOS, PAD, "<|EOT|>"}


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in a byte-level BPE file (GPT-2's table), by byte value."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    table = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [table[byte] for byte in range(256)]


def build_vocabulary() -> tuple[dict[str, int], list[list[str]]]:
    """BPE entries (symbol -> id, bytes first) and merges, each character's bytes joined from the left."""
    symbols = byte_symbols()
    vocabulary = {symbol: FIRST_BYTE_ID + byte for byte, symbol in enumerate(symbols)}
    merges: list[list[str]] = []
    for character in sorted(set(MERGED)):
        joined = ""
        for byte in character.encode():
            if joined and joined + symbols[byte] not in vocabulary:
                merges.append([joined, symbols[byte]])
                vocabulary[joined + symbols[byte]] = FIRST_BYTE_ID + len(vocabulary)
            joined += symbols[byte]
    return vocabulary, merges


def special_ids() -> dict[str, int]:
    """Text -> id of every added token: bos, eos, pad at 0-2, R1's markers right after the BPE entries."""
    first = FIRST_BYTE_ID + len(build_vocabulary()[0])
    return {BOS: 0, EOS: 1, PAD: 2} | {marker: first + i for i, marker in enumerate(MARKERS)}


def tokenizer_json() -> dict:
    """The content of tokenizer.json, laid out as DeepSeek's."""
    vocabulary, merges = build_vocabulary()
    added = [
        {
            "id": index, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": index > PAD_ID, "special": text in _SPECIAL_TRUE,
        }
        for text, index in special_ids().items()
    ]  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    words = {"type": "Split", "pattern": {"Regex": r"\s?\S+|\s+"}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, level]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            # The library numbers an added token that the model does not hold itself, whatever id it is given.
            "vocab": {BOS: 0, EOS: 1, PAD: 2} | vocabulary, "merges": merges,
        },
    }  # fmt: skip


PAD_ID = 2


def tokenizer_config() -> dict:
    """The content of tokenizer_config.json, the chat template included."""
    template = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8").rstrip("\n")

    def token(text: str) -> dict:
        return {
            "__type": "AddedToken", "content": text, "lstrip": False, "normalized": True, "rstrip": False,
            "single_word": False,
        }  # fmt: skip

    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": token(BOS),
        "clean_up_tokenization_spaces": False,
        "eos_token": token(EOS),
        "legacy": True,
        "model_max_length": MODEL_MAX_LENGTH,
        "pad_token": token(EOS),
        "sp_model_kwargs": {},
        "unk_token": None,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": template,
    }


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    for name, content in (("tokenizer.json", tokenizer_json()), ("tokenizer_config.json", tokenizer_config())):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


class CharacterEncoder:
    """Plain text (no markers in it) to ids, the same as tokenizer.json's but many times faster: a table look-up."""

    def __init__(self) -> None:
        vocabulary, _ = build_vocabulary()
        symbols = byte_symbols()
        self.special = special_ids()
        self._bytes = FIRST_BYTE_ID
        self._table = {chr(byte): FIRST_BYTE_ID + byte for byte in range(128)}
        for character in MERGED:
            self._table[character] = vocabulary["".join(symbols[byte] for byte in character.encode())]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Characters outside the table go byte by byte (the real tokenizer may merge two of three)."""
        table = self._table
        try:
            return [table[character] for character in text]
        except KeyError:
            ids: list[int] = []
            for character in text:
                known = table.get(character)
                ids.extend([known] if known is not None else [self._bytes + byte for byte in character.encode()])
            return ids


def token_texts() -> list[str]:
    """Text of every id, for reading generated ids back: markers as they are, lone bytes as U+FFFD."""
    vocabulary, _ = build_vocabulary()
    value = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    texts = {index: text for text, index in special_ids().items()}
    for symbol, index in vocabulary.items():
        texts[index] = bytes(value[c] for c in symbol).decode("utf-8", errors="replace")
    return [texts[index] for index in range(len(texts))]
