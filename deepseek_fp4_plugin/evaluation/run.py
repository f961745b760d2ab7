"""A run on disk: what was asked of whom (run.json), and one JSON line a sample (TASK.jsonl).

A line is written whole once its sample is graded, so an interrupted run goes on where it was; a line cut off by a crash
is dropped and asked again. A line holds all that grading anew needs. Private questions and the answers to them are kept
packed, not as text.
"""

import base64
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deepseek_fp4_plugin.evaluation.statistics import Scores
from deepseek_fp4_plugin.evaluation.task import Grade

_RUN = "run.json"


@dataclass(frozen=True)
class Sample:
    """One question asked once. texts, finish: an answer's text and why it ended, one a turn.

    error: why there is no answer; it counts as wrong, and is shown apart.
    """

    task: str
    id: str
    repeat: int
    seed: int
    prompts: list[str]
    texts: list[str]
    finish: list[str]
    grades: list[Grade]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def truncated(self) -> bool:
        return "length" in self.finish


@dataclass
class Run:
    """Samples by task. about: what run.json says."""

    folder: Path
    about: dict[str, Any]
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def scores(self, task: str) -> Scores:
        """Question -> its graded parts over all repeats, in the order of the repeats."""
        found: dict[str, list[float]] = {}
        for sample in sorted(self.samples[task], key=lambda s: (s.id, s.repeat)):
            found.setdefault(sample.id, []).extend(float(grade.right) for grade in sample.grades)
        return found


def start(folder: Path, about: dict[str, Any]) -> Run:
    """Open a run's folder, new or left unfinished. ValueError when it holds a run with other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _RUN
    if path.exists():
        run = load(folder)
        kept = {name: value for name, value in run.about.items() if name != "model"}
        asked = {name: value for name, value in about.items() if name != "model"}
        for name in asked:
            if kept.get(name) != asked[name]:
                raise ValueError(
                    f"{folder} holds a run with other settings ({name}: {kept.get(name)} there, {asked[name]} now); "
                    "give another folder, or the same settings to go on"
                )
        return run
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run; give another folder")
    _write_whole(path, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    return Run(folder, about)


def load(folder: Path) -> Run:
    """A run, whole or not. ValueError for a folder that holds none."""
    path = folder / _RUN
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{folder} holds no evaluation run ({_RUN} is missing or broken)") from None
    run = Run(folder, about)
    for task in about["tasks"]:
        file = folder / f"{task}.jsonl"
        run.samples[task] = list(_samples(file)) if file.exists() else []
    return run


def _samples(file: Path) -> Iterator[Sample]:
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(file, len(whole))  # the line that a crash cut off
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            yield unpacked(json.loads(line))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}: line {number} is not a sample of ours") from None


class Writer:
    """Appends samples to a task's file. private: questions and answers are packed."""

    def __init__(self, folder: Path, task: str, private: bool):
        self._file = (folder / f"{task}.jsonl").open("ab")
        self._private = private

    def add(self, sample: Sample) -> None:
        line = json.dumps(packed(sample, self._private), ensure_ascii=False) + "\n"
        self._file.write(line.encode("utf-8", errors="surrogatepass"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def packed(sample: Sample, private: bool) -> dict[str, Any]:
    line = asdict(sample)
    if private:
        line["prompts"] = [_hashed(prompt) for prompt in sample.prompts]
        content = json.dumps([sample.texts, [asdict(grade) for grade in sample.grades]]).encode()
        line["packed"] = base64.b64encode(zlib.compress(content)).decode()
        line["texts"] = []
        line["grades"] = [{"right": grade.right} for grade in sample.grades]
    return line


def _hashed(prompt: str) -> str:
    """A prompt's hash; of one that was read back from a line, which holds the hash alone, itself."""
    return (
        prompt
        if re.fullmatch(r"sha256:[0-9a-f]{64}", prompt)
        else f"sha256:{hashlib.sha256(prompt.encode()).hexdigest()}"
    )


def unpacked(line: dict[str, Any]) -> Sample:
    line = dict(line)
    content = line.pop("packed", None)
    if content is not None:
        line["texts"], line["grades"] = json.loads(zlib.decompress(base64.b64decode(content)))
    line["grades"] = [Grade(**grade) for grade in line["grades"]]
    return Sample(**line)


def rewrite(folder: Path, task: str, samples: Iterable[Sample], private: bool) -> None:
    """Put samples in the place of a task's file, whole or not at all."""
    lines = [json.dumps(packed(sample, private), ensure_ascii=False) + "\n" for sample in samples]
    _write_whole(folder / f"{task}.jsonl", "".join(lines))


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
