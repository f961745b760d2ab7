"""Static placement of routed experts over ranks, from how many tokens chose each: hot experts are held more than once.

A step waits for the rank whose experts got the most tokens. Each redundant slot goes to the expert with the most
tokens a replica; then replicas are dealt, heaviest first, to the rank with the least so far (the greedy rules of
DeepSeek's EPLB, for one node).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Held = tuple[tuple[int, ...], ...]  # by rank: the experts in its slots


@dataclass(frozen=True)
class ExpertPlacement:
    """ranks: expert-parallel ones.  layers: each layer's index and what its ranks hold; every expert at least once."""

    ranks: int
    layers: tuple[tuple[int, Held], ...]

    @classmethod
    def balanced(cls, load: Mapping[int, Sequence[int]], ranks: int, num_slots: int) -> "ExpertPlacement":
        """load: layer -> tokens that chose each expert.  num_slots: of all ranks.

        Raises ValueError when the slots cannot be dealt evenly, or are fewer than the experts or too many.
        """
        layers = tuple((layer, _balance(counts, ranks, num_slots)) for layer, counts in sorted(load.items()))
        return cls(ranks, layers)

    def experts(self, layer: int, rank: int, total: int) -> tuple[int, ...]:
        """ValueError for a layer without a placement, or one of another number of experts."""
        held = self._held(layer)
        if {expert for experts in held for expert in experts} != set(range(total)):
            raise ValueError(f"the expert placement of layer {layer} is not one of {total} experts")
        return held[rank]

    def replicas(self, layer: int, rank: int) -> tuple[Tensor, Tensor]:
        """Slots int64 [experts, most replicas]: where `rank` holds that replica of an expert, -1 where it does not.
        And how many replicas each expert has, int64 [experts]."""
        held = self._held(layer)
        places: dict[int, list[int]] = {}
        for owner, experts in enumerate(held):
            for slot, expert in enumerate(experts):
                places.setdefault(expert, []).append(slot if owner == rank else -1)
        counts = [len(places[expert]) for expert in range(len(places))]
        slots = [places[expert] + [-1] * (max(counts) - counts[expert]) for expert in range(len(places))]
        return torch.tensor(slots), torch.tensor(counts)

    def _held(self, layer: int) -> Held:
        for index, held in self.layers:
            if index == layer:
                return held
        raise ValueError(f"the expert load has no layer {layer}; record it with the same model and drafts")


def read_load(path: str | Path) -> dict[int, list[int]]:
    """A load file: a JSON object, layer -> tokens that chose each expert. ValueError for anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        load = {int(layer): [int(count) for count in counts] for layer, counts in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no expert load file ({error}); it holds {{layer: [tokens of each expert]}}"
        ) from None
    if not load or any(count < 0 for counts in load.values() for count in counts):
        raise ValueError(f"{path} is no expert load file: it needs layers, and no count below 0")
    return load


def write_load(path: str | Path, load: Mapping[int, Sequence[int]]) -> None:
    """What `read_load` reads."""
    Path(path).write_text(json.dumps({str(layer): list(counts) for layer, counts in load.items()}), encoding="utf-8")


def _balance(load: Sequence[int], ranks: int, num_slots: int) -> Held:
    experts, each = len(load), num_slots // ranks
    if num_slots % ranks or not experts <= num_slots <= experts * ranks:
        raise ValueError(
            f"{num_slots} expert slots on {ranks} ranks: they must be a multiple of the ranks, "
            f"from {experts} (every expert once) to {experts * ranks} (every expert on every rank)"
        )
    counts = [1] * experts
    for _ in range(num_slots - experts):
        hottest = max((e for e in range(experts) if counts[e] < ranks), key=lambda e: load[e] / counts[e])
        counts[hottest] += 1
    held: list[list[int]] = [[] for _ in range(ranks)]
    weight = [0.0] * ranks
    # Those with more replicas first: an expert must not meet itself, and the ranks with room get fewer.
    for expert in sorted(range(experts), key=lambda e: (-counts[e], -load[e] / counts[e])):
        free = [rank for rank in range(ranks) if len(held[rank]) < each]
        for rank in sorted(free, key=lambda rank: (weight[rank], len(held[rank])))[: counts[expert]]:
            held[rank].append(expert)
            weight[rank] += load[expert] / counts[expert]
        for _ in range(counts[expert] - len(free)):
            _make_room(held, expert, each)
    return tuple(tuple(sorted(experts)) for experts in held)


def _make_room(held: list[list[int]], expert: int, each: int) -> None:
    """Every rank with room holds `expert` already: another gives it one of its experts, and takes this one."""
    (full,) = [rank for rank in range(len(held)) if expert not in held[rank]][:1]
    room = next(rank for rank in range(len(held)) if len(held[rank]) < each)
    moved = next(e for e in held[full] if e not in held[room])
    held[room].append(moved)
    held[full].remove(moved)
    held[full].append(expert)
