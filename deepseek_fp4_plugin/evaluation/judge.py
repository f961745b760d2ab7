"""Whether two mathematical answers are equal: math-verify's verdict, in a process that can be killed.

math-verify's own time limits use SIGALRM, which works on the main thread alone and fails silently elsewhere, so they
are off and the clock is here. It starts when the worker says that it has begun; a worker that is late is killed and a
new one takes its place. Expressions come from a model, so anything may be in them.
"""

import json
import logging
import queue
import subprocess
import sys
import threading
from typing import Any, TextIO

_START_SECONDS = 120.0  # importing sympy on a busy machine
_MAX_CHARACTERS = 10_000  # a longer answer is no answer
_TIMEOUT = "the comparison took too long"


class Judge:
    """Thread-safe; one comparison at a time. `close` ends the worker.

    seconds: for one comparison.  memory: bytes of address space that the worker may take.
    """

    def __init__(self, seconds: float = 10.0, memory: int = 4 << 30):
        self.seconds, self.memory = seconds, memory
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    def equal(self, gold: str, answer: str) -> tuple[bool, str]:
        """Both LaTeX or plain text. The verdict, and a note where there is none to be had (then it is False)."""
        return self._ask(gold, _as_box(answer))

    def finds(self, gold: str, text: str) -> tuple[bool, str]:
        """The same for a text that holds its answer somewhere, most likely at its end."""
        return self._ask(gold, text)

    def _ask(self, gold: str, text: str) -> tuple[bool, str]:
        if len(text) > _MAX_CHARACTERS:
            return False, f"the answer has {len(text)} characters"
        with self._lock:
            if self._worker is None or not self._worker.alive:
                self._worker = _Worker(self.memory)
            reply = self._worker.ask({"gold": _as_box(gold), "answer": text}, self.seconds)
            if reply is None:
                self._worker.kill()
                self._worker = None
                return False, _TIMEOUT
            return bool(reply["equal"]), str(reply["note"])

    def close(self) -> None:
        with self._lock:
            if self._worker is not None:
                self._worker.kill()
                self._worker = None

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    def __init__(self, memory: int):
        command = [sys.executable, "-m", "deepseek_fp4_plugin.evaluation.judge", str(memory)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        if self._line(_START_SECONDS) != "ready\n":
            self.kill()
            raise RuntimeError("math-verify does not start; install the package's eval extra: pip install .[eval]")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, question: dict[str, str], seconds: float) -> dict[str, Any] | None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except OSError:
            return None
        if self._line(_START_SECONDS) is None:  # "begun"
            return None
        line = self._line(seconds)
        return None if line is None else json.loads(line)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _line(self, seconds: float) -> str | None:
        """The worker's next line; None when it ended or is late."""
        try:
            return self._lines.get(timeout=seconds)
        except queue.Empty:
            return None


def _serve(memory: int, questions: TextIO, answers: TextIO) -> None:
    import resource

    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    logging.disable(logging.CRITICAL)

    def say(line: str) -> None:
        answers.write(line + "\n")
        answers.flush()

    say("ready")
    for line in questions:
        question = json.loads(line)
        say("begun")
        equal, note = False, ""
        try:
            gold, answer = (parse(question[name], parsing_timeout=None) for name in ("gold", "answer"))
            equal = verify(gold, answer, timeout_seconds=None)
        except (Exception, RecursionError, MemoryError) as error:
            note = f"the comparison failed: {type(error).__name__}"
        say(json.dumps({"equal": bool(equal), "note": note}))


def _as_box(answer: str) -> str:
    return "\\boxed{" + answer + "}"


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.stdin, sys.stdout)
