"""Running a model's code: bubblewrap's namespaces around it, and limits on time, memory, processes and output.

No network, no files but the system's own (read only) and an empty folder of its own, no other process to see, no
privileges to gain. Without bubblewrap nothing is run at all. Limits: wall and CPU time, address space of each process
and resident memory of all together, number of processes, size of each written file and of what it prints.
"""

import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

_POLL_SECONDS = 0.05
# Root's code runs as a user of its own: the kernel counts processes by user, and does not count root's.
_FIRST_USER, _NUM_USERS = 61000, 4000


class SandboxError(RuntimeError):
    """Code cannot be run safely on this machine."""


@dataclass(frozen=True)
class Limits:
    """Of one run, all its processes together unless said."""

    seconds: float = 10.0
    memory: int = 4 << 30  # bytes
    processes: int = 64
    file_bytes: int = 64 << 20  # of one file
    folder_bytes: int = 256 << 20  # of all files in its own folder; in /tmp; in /dev/shm
    output_bytes: int = 1 << 20  # of standard output, and of standard error


@dataclass(frozen=True)
class Outcome:
    """status: the exit status, negative for a signal.  stopped: which limit ended the run, "" for none."""

    status: int
    stdout: str
    stderr: str
    seconds: float
    stopped: str = ""

    @property
    def ok(self) -> bool:
        return self.status == 0 and not self.stopped


class Sandbox:
    """python: the interpreter that runs the code, with its packages; this one by default."""

    def __init__(self, python: str | Path = sys.executable):
        self.python = Path(python)

    def check(self) -> None:
        """Raises SandboxError where code cannot be run safely."""
        if _bwrap() is None:
            raise SandboxError(
                "bubblewrap (bwrap) is not installed, and without it no generated code is run; install it with your "
                "system's packages, for example apt-get install bubblewrap"
            )
        outcome = self.run("print(6 * 7)", limits=Limits(seconds=60))
        if outcome.stdout != "42\n":
            raise SandboxError(
                f"bubblewrap cannot start a process here ({outcome.stderr.strip() or outcome.stopped}); it needs user "
                "namespaces"
            )

    def run(
        self, code: str, stdin: str = "", files: Mapping[str, bytes] | None = None, limits: Limits | None = None
    ) -> Outcome:
        """Run Python code in a folder of its own in memory, nothing of which is kept.  files: put there, read only."""
        limits = limits or Limits()
        if _bwrap() is None:
            self.check()
        with tempfile.TemporaryDirectory(prefix="deepseek-fp4-sandbox-") as scratch:
            folder = Path(scratch)
            (folder / "main.py").write_text(code, encoding="utf-8", errors="replace")
            for name, content in (files or {}).items():
                (folder / Path(name).name).write_bytes(content)
            user = None
            folder.chmod(0o755)
            if os.geteuid() == 0:
                user = _FIRST_USER + secrets.randbelow(_NUM_USERS)
                for path in (folder, *folder.iterdir()):
                    os.chown(path, user, user)
            processes = limits.processes + (0 if user else _own_processes())
            process = subprocess.Popen(
                self._command(folder, user, limits),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                preexec_fn=lambda: _limit(limits, processes),
                start_new_session=True,
                close_fds=True,
            )
            return _Watch(process, limits).finish(stdin.encode("utf-8", errors="replace"))

    def _command(self, folder: Path, user: int | None, limits: Limits) -> list[str]:
        command = [str(_bwrap()), "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        if user is None:
            command += ["--unshare-all", "--unshare-user", "--disable-userns"]
            become = []
        else:
            command += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
            command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
            become = ["setpriv", "--reuid", str(user), "--regid", str(user), "--clear-groups", "--no-new-privs"]
        command += ["--proc", "/proc", "--dev", "/dev"]
        for path in ("/tmp", "/dev/shm", "/box"):  # before what is read, which may lie in /tmp
            command += ["--perms", "1777", "--size", str(limits.folder_bytes), "--tmpfs", path]
        readable = _readable(self.python)
        for parent in sorted({str(parent) for path in readable for parent in Path(path).parents} - {"/"}):
            command += ["--perms", "0755", "--dir", parent]  # bwrap's own would be closed to the user
        for path in readable:
            command += ["--ro-bind-try", path, path]
        for path in ("/bin", "/lib", "/lib64", "/sbin"):
            if os.path.islink(path):
                command += ["--symlink", os.readlink(path), path]
            else:
                command += ["--ro-bind-try", path, path]
        for file in sorted(folder.iterdir()):
            command += ["--ro-bind", str(file), f"/box/{file.name}"]
        command += ["--chdir", "/box"]
        environment = {"PATH": "/usr/bin:/bin", "HOME": "/box", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1",
                       "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "Agg"}  # fmt: skip
        command += ["--clearenv"]
        for name, value in environment.items():
            command += ["--setenv", name, value]
        return [*command, "--hostname", "box", "--", *become, str(self.python), "-I", "-X", "utf8", "main.py"]


def _bwrap() -> str | None:
    return shutil.which("bwrap")


def _readable(python: Path) -> list[str]:
    """What the interpreter needs of the file system, beside the system's libraries."""
    import sysconfig

    paths = ["/usr", "/etc/ld.so.cache", "/etc/alternatives", "/opt/python"]
    paths += [str(python.parent.parent), sys.base_prefix, os.path.dirname(os.path.realpath(python))]
    paths += [sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("-packages"))]
    paths.append(str(Path(os.path.realpath(python)).parent.parent))
    found: list[str] = []
    for path in paths:
        if path not in found and path not in ("/", "") and os.path.exists(path):
            found.append(path)
    return found


def _limit(limits: Limits, processes: int) -> None:
    """In the child, before anything of it runs."""
    cpu = int(limits.seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes, limits.file_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))


def _own_processes() -> int:
    """How many threads this user has already: they count too."""
    total, user = 0, os.getuid()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                if entry.stat().st_uid == user:
                    total += len(os.listdir(f"/proc/{entry.name}/task"))
            except OSError:
                continue
    return total


class _Watch:
    """Feeds, reads and, at a limit, ends a running process and all it started."""

    def __init__(self, process: subprocess.Popen, limits: Limits):
        self.process, self.limits = process, limits
        self.stopped = ""
        self.began = time.monotonic()

    def finish(self, stdin: bytes) -> Outcome:
        outputs: list[bytes] = [b"", b""]
        threads = [
            threading.Thread(target=self._read, args=(stream, outputs, i), daemon=True)
            for i, stream in enumerate((self.process.stdout, self.process.stderr))
        ]
        threads.append(threading.Thread(target=self._feed, args=(stdin,), daemon=True))
        for thread in threads:
            thread.start()
        while self.process.poll() is None:
            if time.monotonic() - self.began > self.limits.seconds:
                self._stop("time")
            elif self._resident() > self.limits.memory:
                self._stop("memory")
            else:
                time.sleep(_POLL_SECONDS)
        seconds = time.monotonic() - self.began
        for thread in threads:
            thread.join(5)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        status = self.process.returncode
        if not self.stopped and status in (-signal.SIGXCPU, 128 + signal.SIGXCPU):
            self.stopped = "time"
        stdout, stderr = (output.decode("utf-8", errors="replace") for output in outputs)
        return Outcome(status, stdout, stderr, seconds, self.stopped)

    def _stop(self, why: str) -> None:
        self.stopped = self.stopped or why
        self.process.kill()  # bwrap; its process namespace dies with it
        self.process.wait()

    def _feed(self, stdin: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(stdin)
            self.process.stdin.close()
        except OSError:
            pass  # it does not read, or is gone

    def _read(self, stream, outputs: list[bytes], index: int) -> None:
        kept, total = [], 0
        try:
            while chunk := stream.read1(65536):
                total += len(chunk)
                kept.append(chunk)
                if total > self.limits.output_bytes:
                    self.stopped = self.stopped or "output"
                    self.process.kill()
                    break
        except (OSError, ValueError):
            pass
        outputs[index] = b"".join(kept)[: self.limits.output_bytes]

    def _resident(self) -> int:
        """Resident bytes of the process and all below it."""
        try:
            top = psutil.Process(self.process.pid)
            family = [top, *top.children(recursive=True)]
        except psutil.Error:
            return 0
        total = 0
        for member in family:
            try:
                total += member.memory_info().rss
            except psutil.Error:
                continue
        return total
