"""Who may work in a folder: one process, or several that agree to share. A lock ends with its process, anywhere."""

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from deepseek_fp4_plugin.checkpoint.durable import make_folder
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError

LOCK = "lock"


def lock_folder(folder: Path, other_job: Callable[[], bool], shared: bool = False) -> IO[str]:
    """The lock of `folder`, which is made.  shared: beside others that share, too.

    other_job: whether what is done there differs from what the caller would do, for the message.
    Raises CheckpointError while a living process has the folder.
    """
    while True:
        make_folder(folder)
        try:
            file = open(folder / LOCK, "a+")  # noqa: SIM115 (held until close)
        except FileNotFoundError:  # its run has just ended and taken the folder along
            continue
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
                break
        except FileNotFoundError:
            pass
        except BlockingIOError:
            file.seek(0)
            who = file.read(200).strip()
            file.close()
            raise CheckpointError(
                f"{folder} is being written by another run{f' ({who})' if who else ''}"
                f"{', which does a different job' if other_job() else ''}; wait for it or stop it"
            ) from None
        file.close()
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    except OSError:  # a full disk; the name is a courtesy, the lock is held without it
        pass
    return file


def is_last(folder: Path) -> bool:
    """Whether nobody holds the folder's lock, after the caller gave up its own."""
    try:
        with open(folder / LOCK, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        return False
    return True


@contextmanager
def claim(path: Path, wait: bool) -> Iterator[bool]:
    """Hold what the file at `path` stands for; True when this process has it.  wait: until its holder ends.

    False also where the folder is gone: whoever did the work has finished it.
    """
    try:
        file = open(path, "a")  # noqa: SIM115
    except FileNotFoundError:
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
