"""Quantizations stopped somewhere, and what their next run makes of it."""

import random
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint
from tests.power_loss import Disk, no_space
from tests.tiny import tiny_config, write_checkpoint
from training.tokenizer import write_tokenizer

NAME = "result"
SETTINGS = {"calibration": "builtin", "samples": 2, "tokens": 16, "max_shard_bytes": 150_000}
KINDS = ("kill", "power loss", "no space")


class Stop(NamedTuple):
    step: int
    kind: str


def small_source(folder: Path) -> Path:
    """Ten shards' worth of one dense layer, one of experts and MTP, quantized in half a second."""
    changes = {"num_hidden_layers": 2, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "hidden_size": 64}
    write_checkpoint(folder, tiny_config(vocab_size=1024, **changes))
    write_tokenizer(folder)
    return folder


def quantize(source: Path, folder: Path) -> dict[str, bytes]:
    """Quantize into `folder` / NAME; its contents."""
    quantize_checkpoint(source, folder / NAME, **SETTINGS)
    return contents(folder / NAME)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def steps(source: Path, folder: Path) -> tuple[list[str], dict[str, bytes]]:
    """What an uninterrupted run does to its disk, step by step, and the bytes that it ends with."""
    folder.mkdir()
    disk = Disk(folder, lambda step, what: None)
    with disk.watched():
        expected = quantize(source, folder)
    return disk.steps, expected


def prove(source: Path, folder: Path, stops: list[Stop], expected: dict[str, bytes]) -> Counter:
    """Stop runs at `stops`, run each again, and check that it ends as if it had never been stopped. Counts how."""
    chance = random.Random(0)
    waiting = {stop: folder / f"{stop.step:04d}-{stop.kind.replace(' ', '-')}" for stop in stops}
    disk: Disk

    def copy(step: int, what: str) -> None:
        if (stop := Stop(step, "kill")) in waiting:
            disk.left_after_kill(waiting[stop])
        if (stop := Stop(step, "power loss")) in waiting:
            disk.left_after_power_loss(waiting[stop], chance)

    whole = folder / "whole"
    whole.mkdir()
    disk = Disk(whole, copy)
    with disk.watched():
        assert quantize(source, whole) == expected
    ended: Counter = Counter()
    for stop, left in waiting.items():
        if stop.kind == "no space":
            _fill_disk(source, left, stop.step)
        ended[stop.kind, _run_again(source, left, expected, f"{stop} {disk.steps[stop.step]}")] += 1
    return ended


def _fill_disk(source: Path, folder: Path, at: int) -> None:
    """A run that finds no space from step `at` on, as long as it goes on writing."""

    def refuse(step: int, what: str) -> None:
        if step >= at and what.split()[0] in ("write", "fsync", "replace", "rename", "mkdir"):
            raise no_space()

    folder.mkdir()
    with Disk(folder, refuse).watched():
        sentence = _sentence(source, folder)
    assert not sentence or ("No space left on device" in sentence and "\n" not in sentence), sentence


def _run_again(source: Path, folder: Path, expected: dict[str, bytes], where: str) -> str:
    closed = len(list(folder.rglob("*.safetensors")))
    sentence = _sentence(source, folder)
    how = "had ended" if sentence else "went on" if closed else "began again"
    assert not sentence or "exists and is not empty" in sentence, (where, sentence)  # after the last of tidying up
    assert contents(folder / NAME) == expected, where
    assert [path.name for path in folder.iterdir()] == [NAME], where
    return how


def _sentence(source: Path, folder: Path) -> str:
    """What a run says that could not do its work; nothing of one that did."""
    try:
        quantize(source, folder)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return small_source(tmp_path_factory.mktemp("stops") / "source")
