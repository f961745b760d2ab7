"""Turn what a user calls a model (a folder, `r1_nano`, a Hugging Face id) into a local folder."""

import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.sizes import size_text

EMBEDDED = "r1_nano"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# What a checkpoint has beside its weights and card, and a quantized copy takes along: `auto_map` of config.json names
# the *.py files. Nothing here runs them.
SMALL_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".py")
_SMALL_NAMES = ("LICENSE", "NOTICE")
_PATTERNS = [
    "*.safetensors",
    "README.md",
    *(f"*{suffix}" for suffix in SMALL_SUFFIXES),
    *("".join(f"[{c}{c.lower()}]" for c in name) + "*" for name in _SMALL_NAMES),  # in upper or lower case
]


def is_small_file(name: str) -> bool:
    """True for the files of a checkpoint's folder that come along with its weights, whoever copies it."""
    return name.endswith(SMALL_SUFFIXES) or name.upper().startswith(_SMALL_NAMES)


def embedded_folder() -> Path:
    """The folder of the embedded model inside the installed package."""
    return Path(__file__).parents[1] / "assets" / EMBEDDED


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """The local folder of `model`; a Hugging Face id is downloaded first (resumed if interrupted).

    A folder wins over the embedded model and over a hub id of the same name. Raises CheckpointError when there is no
    such folder and the name is not a hub id, when the hub cannot be reached, or when the disk is too small.
    """
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise CheckpointError(f"{model}: {str(error).rstrip('.')}") from None
    if path.is_dir():
        return path
    if str(model) == EMBEDDED:
        return embedded_folder()
    if not _HUB_ID.fullmatch(str(model)) or str(model).startswith((".", "/", "~")):
        raise CheckpointError(
            f"{model} is neither a folder nor a Hugging Face id (owner/name); the embedded model is called {EMBEDDED}"
        )
    return _download(str(model), revision)


def _download(model_id: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        cached = snapshot_download(model_id, revision=revision, allow_patterns=_PATTERNS, local_files_only=True)
    except LocalEntryNotFoundError:
        cached = None
    try:
        info = HfApi().model_info(model_id, revision=revision, files_metadata=True)
    except OfflineModeIsEnabled:
        if cached:
            return Path(cached)
        raise CheckpointError(f"{model_id} is not on this machine and HF_HUB_OFFLINE is set") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        raise CheckpointError(
            f"Hugging Face refused {model_id} (HTTP {status}); check the name, and HF_TOKEN if it is private or gated"
        ) from None
    except Exception:  # the hub's HTTP library has changed, and its errors with it
        raise CheckpointError(
            f"{model_id} is not a folder here and huggingface.co cannot be reached; "
            "check the connection, or download the checkpoint elsewhere and give its folder"
        ) from None
    wanted = [f for f in info.siblings or [] if any(fnmatch(f.rfilename, pattern) for pattern in _PATTERNS)]
    size = sum(f.size or 0 for f in wanted)
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    have = sum(p.stat().st_size for p in (cache / f"models--{model_id.replace('/', '--')}").rglob("blobs/*"))
    if size - have > free:
        raise CheckpointError(
            f"{model_id} needs {size_text(size - have)} more and {cache} has {size_text(free)} free; "
            "set HF_HOME to a larger disk"
        )
    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=_PATTERNS))
    except Exception as error:  # of the network, the hub or the disk, at any time in hours of downloading
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"the download of {model_id} stopped ({reason}); run again to continue it") from None
