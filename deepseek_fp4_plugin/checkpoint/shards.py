"""Which tensors a folder has and in which file: the index, the shards' headers, and where they disagree.

The index decides which shard a tensor is read from. What a shard holds is read from its own header, because published
NVFP4 checkpoints have indexes that omit the scale tensors: a tensor that the index does not name is taken where its
module's weight is. Headers only; no value is read.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from deepseek_fp4_plugin.checkpoint.compressed_tensors import INVERTED, OWN_NAMES
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.findings import Fault, Finding, error, note, warning
from deepseek_fp4_plugin.checkpoint.json_files import parse_object, read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


class TensorInfo(NamedTuple):
    """Where a tensor is and what it is, from the shard's header.

    shard: its path inside the checkpoint's folder.  offset: of its first byte in the shard.  indexed: false when there
    is an index and it does not name the tensor.  stored_as: the last part of its name there, where that is another.
    """

    shard: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    indexed: bool = True
    stored_as: str = ""

    @property
    def inverted(self) -> bool:
        """Whether the file holds 1 / x of what the name means here."""
        return self.stored_as in INVERTED

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Shards(NamedTuple):
    """A folder's tensors. names: of the shards, sorted.  findings: what is wrong with files, index and headers."""

    names: list[str]
    tensors: dict[str, TensorInfo]
    findings: list[Finding]


def scan(folder: Path) -> Shards:
    """Read the index and every header. What is wrong goes into the findings; nothing is raised."""
    found = Shards([], {}, [])
    if not folder.is_dir():
        found.findings.append(
            error(str(folder), f"{folder} is not a folder; give a checkpoint folder or a Hugging Face id")
        )
        return found
    try:
        indexed = _index(folder, found.findings)
    except CheckpointError as problem:
        found.findings.append(error(INDEX_NAME, str(problem)))
        return found
    found.names.extend(sorted(set(indexed.values())) if indexed else [SINGLE_NAME])
    headers = _headers(folder, found)
    _resolve(folder, found, headers, indexed)
    _unnamed_shards(folder, found)
    return found._replace(tensors=_in_own_names(found.tensors))


def read_header(path: Path, shard: str | None = None) -> dict[str, TensorInfo]:
    """The tensors of one file, named `shard` in what is returned. Raises CheckpointError naming the file."""
    try:
        with safe_open(path, framework="pt"):  # validates lengths and offsets against the file's size
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_object(file.read(length))
    except (SafetensorError, OSError, ValueError, TypeError) as problem:
        raise CheckpointError(f"{path} is damaged or truncated ({problem}); copy or download it again") from None
    header.pop("__metadata__", None)
    infos = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{name} in {path} has dtype {entry['dtype']}, which this program does not read")
        offset = 8 + length + entry["data_offsets"][0]
        infos[name] = TensorInfo(shard or path.name, DTYPES[entry["dtype"]], tuple(entry["shape"]), offset)
    return infos


def _index(folder: Path, findings: list[Finding]) -> dict[str, str]:
    """The index's tensor -> shard map, of entries that make sense; empty for a single file."""
    path = folder / INDEX_NAME
    if not path.exists():
        if (folder / SINGLE_NAME).exists():
            return {}
        if any(folder.glob("*.safetensors")):
            raise CheckpointError(f"{folder} has safetensors shards but no {INDEX_NAME}; the checkpoint is incomplete")
        raise CheckpointError(f"{folder} holds no {SINGLE_NAME} and no {INDEX_NAME}; it is not a checkpoint")
    content = read_json(path)
    indexed = content.get("weight_map")
    if not isinstance(indexed, dict) or not indexed:
        raise CheckpointError(f"{path} has no weight_map")
    for name, shard in indexed.items():
        if not isinstance(shard, str) or not _inside(shard):
            raise CheckpointError(
                f"{path}: weight_map gives {json.dumps(shard)} for {name}, expected the path of a shard inside the "
                "checkpoint's folder"
            )
    metadata = content.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else metadata
    if total is not None and (not isinstance(total, int) or isinstance(total, bool) or total < 0):
        findings.append(note(INDEX_NAME, f"{path}: metadata.total_size is {json.dumps(total)}; it is not used"))
    return {name: str(PurePosixPath(shard)) for name, shard in indexed.items()}


def _inside(shard: str) -> bool:
    path = PurePosixPath(shard)
    return bool(shard) and not path.is_absolute() and ".." not in path.parts and "\\" not in shard and "\0" not in shard


def _headers(folder: Path, found: Shards) -> dict[str, dict[str, TensorInfo]]:
    missing = [shard for shard in found.names if not (folder / shard).is_file()]
    if missing:
        found.findings.append(
            error(
                missing[0],
                f"{folder} lacks {len(missing)} of its {len(found.names)} shards, first {missing[0]}; "
                "download it again",
                fault=Fault.MISSING_SHARD,
            )
        )
    headers = {}
    for shard in found.names:
        if shard not in missing:
            try:
                headers[shard] = read_header(folder / shard, shard)
            except CheckpointError as problem:
                found.findings.append(error(shard, str(problem), fault=Fault.DAMAGED_FILE))
    return headers


def _resolve(
    folder: Path, found: Shards, headers: Mapping[str, Mapping[str, TensorInfo]], indexed: Mapping[str, str]
) -> None:
    """Choose each tensor's shard, and tell of copies that are not used and of tensors that are not there."""
    holders: dict[str, list[str]] = {}
    for shard, tensors in headers.items():
        for name in tensors:
            holders.setdefault(name, []).append(shard)
    stale = []
    for name, shards in holders.items():
        chosen = _chosen(name, shards, indexed)
        if chosen is None:
            found.findings.append(
                error(
                    name,
                    f"{name} in {folder} is in {' and in '.join(shards)} and {INDEX_NAME} names neither; "
                    "add it to weight_map",
                )
            )
            continue
        if chosen in headers and name in headers[chosen]:
            found.tensors[name] = headers[chosen][name]._replace(indexed=not indexed or name in indexed)
        elif chosen in headers:  # an error, told of below; what else is wrong is looked for with the copy there is
            found.tensors[name] = headers[shards[-1]][name]
        stale += [(name, shard, chosen) for shard in shards if shard != chosen]
    if stale:
        name, shard, chosen = stale[0]
        sentence = f"{name} in {folder} is read from {chosen}, as {INDEX_NAME} says; the copy in {shard} is not used"
        found.findings.append(warning(name, sentence, len(stale)))
    unnamed = [name for name, info in found.tensors.items() if not info.indexed]
    if unnamed:
        sentence = f"{unnamed[0]} in {folder} is not named by {INDEX_NAME}; only its shard's header tells of it"
        found.findings.append(note(unnamed[0], sentence, len(unnamed)))
    absent = [(name, shard) for name, shard in indexed.items() if shard in headers and name not in headers[shard]]
    if absent:
        name, shard = absent[0]
        sentence = f"{INDEX_NAME} in {folder} says {name} is in {shard}, but it is not there"
        elsewhere = all(tensor in holders for tensor, _ in absent)
        fault = Fault.WRONG_INDEX if elsewhere else Fault.MISSING_TENSOR
        found.findings.append(error(name, f"{sentence}; download {shard} and the index again", len(absent), fault))


def _chosen(name: str, shards: list[str], indexed: Mapping[str, str]) -> str | None:
    if name in indexed:
        return indexed[name]
    if len(shards) == 1:
        return shards[0]
    beside = indexed.get(f"{name.rpartition('.')[0]}.weight")
    return beside if beside in shards else None


def _unnamed_shards(folder: Path, found: Shards) -> None:
    """Files that look like shards of this checkpoint and belong to no index: what is in them is lost."""
    for path in sorted(folder.glob("*.safetensors")):
        if path.name in found.names:
            continue
        by = INDEX_NAME if (folder / INDEX_NAME).exists() else f"{SINGLE_NAME}, which is read alone without an index,"
        try:
            names = list(read_header(path))
        except CheckpointError as problem:
            found.findings.append(note(path.name, f"{path} is not named by {by} and not used; {problem}"))
            continue
        lost = [name for name in names if name not in found.tensors]
        held = f"{len(lost):,} tensors that no other shard has, first {lost[0]}" if lost else "copies only"
        how = "; add them to weight_map if they belong to the model" if lost else ""
        sentence = f"{path} is not named by {by} and not used: it holds {held}{how}"
        fault = Fault.UNNAMED_SHARD if lost else None
        found.findings.append((warning if lost else note)(path.name, sentence, fault=fault))


def anywhere(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of every readable shard of a folder, whether an index names it or not; of copies the last file's."""
    found: dict[str, TensorInfo] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            found |= read_header(path)
        except CheckpointError:
            continue
    return found


def _in_own_names(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Tensors that other programs name otherwise, under the names that are read here; each says what it is called."""
    groups = by_module(tensors)
    renamed = {}
    for name, info in tensors.items():
        module, _, suffix = name.rpartition(".")
        own = _own_suffix(groups[module], suffix)
        if own != suffix:
            name, info = f"{module}.{own}", info._replace(stored_as=suffix)
        renamed[name] = info
    return renamed


def _own_suffix(group: Mapping[str, TensorInfo], suffix: str) -> str:
    if "weight_packed" in group and "weight_global_scale" in group and "weight" not in group:
        return OWN_NAMES.get(suffix, suffix)
    is_fp8 = "weight" in group and group["weight"].dtype == torch.float8_e4m3fn
    if is_fp8 and suffix == "weight_scale" and "weight_scale_inv" not in group:
        return "weight_scale_inv"  # of ModelOpt and compressed-tensors: it multiplies as DeepSeek's does
    return suffix


def by_module(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Module -> last part of the name -> tensor."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, {})[suffix] = info
    return modules
