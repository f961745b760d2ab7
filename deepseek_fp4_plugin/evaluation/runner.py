"""Asking a task's questions: bounded concurrency, repeats, resume; every sample is graded and written as it comes."""

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from deepseek_fp4_plugin.evaluation.answers import without_thinking
from deepseek_fp4_plugin.evaluation.client import Client, ClientError
from deepseek_fp4_plugin.evaluation.run import Run, Sample, Writer, load, rewrite
from deepseek_fp4_plugin.evaluation.task import Example, Grade, Settings, Task, Tools

Progress = Callable[[int, int, int, int], None]  # samples done, in all, right parts, parts

_STOP_AFTER = 10  # samples without an answer in a row: the server is gone


async def ask_all(
    run: Run,
    task: Task,
    examples: Sequence[Example],
    client: Client,
    tools: Tools,
    settings: Settings,
    seed: int,
    concurrency: int,
    progress: Progress | None = None,
) -> None:
    """Complete `run` for a task: what it has already is not asked again.

    A sample that gets no answer (the server refuses the request) is written with its error and counts as wrong. After
    ten of them in a row the run stops with ClientError, and can be resumed.
    """
    held = run.samples.setdefault(task.name, [])
    done = {(sample.id, sample.repeat) for sample in held}
    waiting = [(e, r) for r in range(settings.repeats) for e in examples if (e.id, r) not in done]
    waiting.reverse()
    total = settings.repeats * len(examples)
    writer = Writer(run.folder, task.name, task.private)
    failures, last = 0, ""

    def report() -> None:
        if progress is not None:
            grades = [grade for sample in held for grade in sample.grades]
            progress(len(held), total, sum(grade.right for grade in grades), len(grades))

    async def work() -> None:
        nonlocal failures, last
        while waiting:
            example, repeat = waiting.pop()
            sample = await _sample(task, example, repeat, client, tools, settings, seed)
            failures = failures + 1 if sample.error else 0
            last = sample.error or last
            if failures >= _STOP_AFTER:
                raise ClientError(f"{failures} questions in a row got no answer, the last one: {sample.error}")
            if not sample.error or not _may_pass(sample.error):
                writer.add(sample)
                held.append(sample)
            report()

    report()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(waiting))):
                group.create_task(work())
    except* ClientError as errors:
        raise ClientError(str(errors.exceptions[0])) from None
    finally:
        writer.close()
    missing = total - len(held)
    if missing:
        raise ClientError(f"{missing} of {total} samples got no answer ({last}); the same command asks them anew")


def _may_pass(error: str) -> bool:
    """A fault of the server or the line, not of the request: nothing is written, so that a resumed run asks again."""
    return not any(f"code: {status}" in error for status in (400, 413, 422))


async def _sample(
    task: Task, example: Example, repeat: int, client: Client, tools: Tools, settings: Settings, seed: int
) -> Sample:
    prompts: list[str] = []
    texts: list[str] = []
    finish: list[str] = []
    prompt_tokens = completion_tokens = 0
    first = sample_seed(seed, task.name, example.id, repeat)
    began = time.perf_counter()
    conversation = task.conversation(example)
    error = ""
    try:
        prompt = next(conversation)
        while True:
            prompts.append(prompt)
            completion = await client.complete([{"role": "user", "content": prompt}], settings, first + len(texts))
            texts.append(completion.text)
            finish.append(completion.finish)
            prompt_tokens += completion.prompt_tokens
            completion_tokens += completion.completion_tokens
            prompt = conversation.send(without_thinking(completion.text))
    except StopIteration:
        pass
    except ClientError as failure:
        error = str(failure)
    seconds = time.perf_counter() - began
    grades = (
        [Grade(False, None, "no answer")] if error else await asyncio.to_thread(graded, task, example, texts, tools)
    )
    return Sample(
        task.name,
        example.id,
        repeat,
        first,
        prompts,
        texts,
        finish,
        grades,
        prompt_tokens,
        completion_tokens,
        seconds,
        error,
    )


def graded(task: Task, example: Example, texts: Sequence[str], tools: Tools) -> list[Grade]:
    """Grades of the answers, reasoning removed."""
    return task.grade(example, [without_thinking(text) for text in texts], tools)


def regrade_run(folder: Path, task: Task, examples: Sequence[Example], tools: Tools) -> tuple[int, int]:
    """Grade a run's answers again and write them in place; how many samples changed, and how many there are.

    Raises ValueError when an answered question is not among the examples.
    """
    run, known = load(folder), {example.id: example for example in examples}
    fresh, changed = [], 0
    for sample in run.samples.get(task.name, []):
        if sample.id not in known:
            raise ValueError(f"{folder} holds an answer to {sample.id!r}, which is not among {task.title}'s questions")
        grades = sample.grades if sample.error else graded(task, known[sample.id], sample.texts, tools)
        changed += [g.right for g in grades] != [g.right for g in sample.grades]
        fresh.append(replace(sample, grades=grades))
    if not fresh:
        raise ValueError(f"{folder} holds no sample of {task.title}")
    rewrite(folder, task.name, fresh, task.private)
    return changed, len(fresh)


def sample_seed(seed: int, task: str, example: str, repeat: int) -> int:
    """A sample's own seed, whatever the order in which samples are asked."""
    digest = hashlib.sha256(f"{seed}/{task}/{example}/{repeat}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1
