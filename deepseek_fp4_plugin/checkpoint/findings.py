"""What is wrong, odd or unused in a checkpoint, as a list: looking goes on after the first thing found.

The loader and the quantizer refuse at an error and say the warnings; `inspect` shows everything; `doctor` adds what
needs values or the source, and says for each kind of fault what other runtimes make of it and whether it can be mended.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError


class Severity(StrEnum):
    """ERROR: cannot be used.  WARNING: can, and is said each time.  NOTE: for who looks closely."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class Fault(StrEnum):
    """What kind of fault a finding tells of, where runtimes differ in what they make of it."""

    DAMAGED_FILE = "damaged file"
    MISSING_SHARD = "missing shard"
    MISSING_TENSOR = "missing tensor"
    WRONG_INDEX = "index names the wrong shard"
    UNNAMED_SHARD = "shard that the index does not name"
    OTHER_MODEL = "tensors of another model"
    NO_SCALE = "missing weight scale"
    SCALE_SIZE = "scale of the wrong size"
    TILED_SCALES = "scales in the tensor cores' order"
    TENSOR_SCALE = "tensor scale that is no scale"
    RECIPROCAL = "reciprocal tensor scale"
    BLOCK_SCALE = "block scale that is no scale"
    PAIR_SCALES = "gate and up with different tensor scales"
    NO_INPUT_SCALE = "missing input scale"
    INPUT_SCALE = "input scale that is no scale"
    NIBBLES = "nibbles in the wrong order"
    ROUNDING = "wrong rounding"
    OTHER_VALUES = "values that are not the source's"
    NOT_FINITE = "values that are not finite"
    MTP_ABSENT = "MTP layer counted but not there"
    MTP_UNCOUNTED = "MTP layer there but not counted"
    MTP_DROPPED = "MTP layer of the source not there"
    MTP_COPIES = "MTP layer's own embedding or head"
    LATENT_QUANTIZED = "kv_b_proj quantized"
    LISTS = "list of unquantized modules"
    QUANT_FILES = "quantization files that disagree"
    AUTO_MAP = "auto_map without its code"
    SPECIAL_TOKENS = "special tokens that disagree"
    VOCABULARY = "tokens beyond the vocabulary"
    TRUNCATION = "truncation or padding in tokenizer.json"
    CHAT_TEMPLATE = "chat template that does not fit"
    NO_TOKENIZER = "missing tokenizer"


@dataclass(frozen=True)
class Finding:
    """One thing, in one sentence that says what, where and what to do.

    subject: the tensor, file or field.  count: how many tensors it stands for; `subject` is the first of them.
    unused: the tensors are read by nothing and come into no result.  fault: its kind, where doctor knows more of it.
    """

    severity: Severity
    subject: str
    sentence: str
    count: int = 1
    unused: bool = False
    fault: Fault | None = None

    def __str__(self) -> str:
        return self.sentence if self.count == 1 else f"{self.sentence} ({self.count - 1:,} more like it)"


def error(subject: str, sentence: str, count: int = 1, fault: Fault | None = None) -> Finding:
    return Finding(Severity.ERROR, subject, sentence, count, fault=fault)


def warning(subject: str, sentence: str, count: int = 1, unused: bool = False, fault: Fault | None = None) -> Finding:
    return Finding(Severity.WARNING, subject, sentence, count, unused, fault)


def note(subject: str, sentence: str, count: int = 1, unused: bool = False, fault: Fault | None = None) -> Finding:
    return Finding(Severity.NOTE, subject, sentence, count, unused, fault)


def refuse(findings: Iterable[Finding]) -> None:
    """Raises CheckpointError with the first error's sentence, if there is one, and the number of the others."""
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    if len(errors) > 1:
        others = f"{len(errors) - 1} more finding{'s' if len(errors) > 2 else ''}"
        raise CheckpointError(f"{errors[0]} [and {others}: deepseek-fp4 inspect lists them]")
    if errors:
        raise CheckpointError(str(errors[0]))
