"""Train r1_nano from scratch, or go on from an export, and write the FP8 checkpoint.

    python -m training.train --out runs/r1_nano --minutes 10 --device cuda --workers 12 --compile
    python -m training.train --out runs/r1_nano --minutes 10 --resume          (after an interruption)

Under --out: `r1_nano/` (the checkpoint, written now and then and at the end), `curve.csv`, `state.pt` (for --resume),
`evaluation.json`. The learning rate, the expert balancing and the rounding of the last part follow the share of the
time that has passed.
"""

import argparse
import csv
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import training.model
from deepseek_fp4_plugin.assets.held_out import HeldOutProblem
from training.config import model_config
from training.data import Batch, batches, load_books
from training.evaluate import DRAFTS, continuations, evaluate
from training.export import export, load
from training.held_out import problems
from training.model import Model, MoE
from training.optimizer import optimizers
from training.quantize import rounded

LENGTH = 512  # of a row of documents, in tokens
MTP_WEIGHT = 0.5
TRUNK_SHARE = 0.6  # of the MTP loss's gradient that reaches the main layers
COLUMNS = ("step", "tokens", "seconds", "loss", *(f"mtp_{i + 1}" for i in range(DRAFTS)), "lr", "imbalance")
CARD_PROMPTS = (
    "Hello, my name is", "The president of the United States is", "The capital of France is", "The future of AI is",
)  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--minutes", type=float, default=10.0, help="wall time of training, evaluation not included")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens per optimizer step")
    parser.add_argument("--workers", type=int, default=1, help="processes that make data; 0: this one")
    parser.add_argument("--books", type=Path, default=None, help="public-domain books, jsonl.gz with a text field")
    parser.add_argument("--matrix-lr", type=float, default=4e-3, help="peak learning rate of Muon")
    parser.add_argument("--other-lr", type=float, default=3e-3, help="peak learning rate of AdamW")
    parser.add_argument("--hold", type=float, default=0.2, help="share of the time at the peak learning rate")
    parser.add_argument("--rounded", type=float, default=0.2, help="last share of the time on rounded weights")
    parser.add_argument("--init", type=Path, default=None, help="start from this exported checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from state.pt under --out")
    parser.add_argument("--compile", action="store_true", help="torch.compile the elementwise parts")
    parser.add_argument("--save-minutes", type=float, default=2.0, help="time between exports")
    parser.add_argument("--problems", type=int, default=504, help="held-out problems to evaluate at the end")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def losses(model: Model, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss of the next token, then of each draft: FP32 [1 + DRAFTS]."""
    ids, documents = batch["ids"], batch["documents"]
    hidden = model(ids, batch["positions"], documents)
    trunk = hidden.detach() + TRUNK_SHARE * (hidden - hidden.detach())
    outputs = [hidden, *model.drafts(trunk, ids, batch["positions"], documents, DRAFTS)]
    means = []
    for ahead, output in enumerate(outputs, 1):
        weight = batch["weights"][:, ahead:] * (documents[:, ahead:] == documents[:, :-ahead])
        logits = model.logits(output[:, :-ahead]).flatten(0, 1)
        loss = F.cross_entropy(logits, ids[:, ahead:].flatten(), reduction="none")
        means.append((loss * weight.flatten()).sum() / weight.sum().clamp(min=1))
    return torch.stack(means)


def to_device(batch: Batch, device: str) -> dict[str, Tensor]:
    """A data.Batch as tensors: int64 ids, positions and documents, FP32 weights."""
    tensors = {name: torch.from_numpy(array) for name, array in batch._asdict().items()}
    if device != "cpu":
        tensors = {name: t.pin_memory().to(device, non_blocking=True) for name, t in tensors.items()}
    return {name: t.float() / 100 if name == "weights" else t.long() for name, t in tensors.items()}


class Trainer:
    def __init__(self, arguments: argparse.Namespace):
        self.a = a = arguments
        a.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(a.seed)
        state = torch.load(a.out / "state.pt", map_location="cpu", weights_only=True) if a.resume else None
        fresh = a.seed + 1 + (state["step"] if state else 0)  # going on must not mean the same data again
        self.batches = batches(fresh, a.workers, load_books(a.books), a.tokens, LENGTH)
        self.first: Batch | None = next(self.batches)  # starts the workers before a GPU is touched
        self.model = (load(a.init) if a.init else Model(model_config())).to(a.device)
        self.optimizers = optimizers(self.model, a.matrix_lr, a.other_lr)
        self.peaks = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.experts = [m for m in self.model.modules() if isinstance(m, MoE)]
        self.losses = losses
        self.step, self.tokens, self.before, self.rows = 0, 0, 0.0, []
        if state:
            self._resume(state)
        self.start = time.monotonic()

    def elapsed(self) -> float:
        return self.before + time.monotonic() - self.start

    def run(self) -> None:
        a, last_save = self.a, self.elapsed()
        self.model.train()
        while (share := self.elapsed() / (60 * a.minutes)) < 1:
            batch, self.first = self.first or next(self.batches), None
            self._step(to_device(batch, a.device), share)
            if self.step % 20 == 0 or a.device == "cpu":
                self._log()
            if self.elapsed() - last_save > 60 * a.save_minutes:
                self.save()
                last_save = self.elapsed()
        self.save()

    def _step(self, batch: dict[str, Tensor], share: float) -> None:
        a = self.a
        scale = min(1.0, (self.step + 1) / 50) * min(1.0, max(0.02, (1 - share) / (1 - a.hold)))
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
        if share > 1 - a.rounded:
            with rounded(self.model, nvfp4_layers=self.step % 2 == 1):
                means = self._backward(batch)
        else:
            means = self._backward(batch)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loads = torch.stack([e.load.max() / e.load.mean().clamp(min=1) for e in self.experts])
        if share < 0.9:
            for experts in self.experts:
                experts.balance(0.004 if share < 0.1 and not a.init else 0.001)
        self.step += 1
        self.tokens += batch["ids"].numel()
        self.scale = scale
        self.last = torch.cat((means, loads.mean().view(1)))

    def _backward(self, batch: dict[str, Tensor]) -> Tensor:
        means = self.losses(self.model, batch)
        (means[0] + MTP_WEIGHT * means[1:].mean()).backward()
        return means.detach()

    def _log(self) -> None:
        *means, imbalance = self.last.tolist()
        row = (self.step, self.tokens, round(self.elapsed(), 1), *(round(m, 4) for m in means), self.scale, imbalance)
        self.rows.append(row)
        print(" ".join(f"{n}={v:.4g}" for n, v in zip(COLUMNS, row, strict=True)), flush=True)

    def save(self) -> None:
        """Export, curve and the state to resume from."""
        export(self.model, self.a.out / "r1_nano")
        with open(self.a.out / "curve.csv", "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *self.rows])
        state: dict[str, Any] = {"model": self.model.state_dict(), "rows": self.rows}
        state |= {"optimizers": [o.state_dict() for o in self.optimizers]}
        state |= {"step": self.step, "tokens": self.tokens, "seconds": self.elapsed()}
        temporary = self.a.out / "state.pt.partial"
        torch.save(state, temporary)
        temporary.replace(self.a.out / "state.pt")

    def _resume(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self.before = state["step"], state["tokens"], state["seconds"]
        self.rows = [tuple(row) for row in state["rows"]]


COMPILED = ("rms_norm", "rotary", "gated", "choose", "weighted_sum")


@contextmanager
def compiled_parts() -> Iterator[None]:
    """Fuse the elementwise functions inside; products and attention are the platform's own."""
    eager = {name: getattr(training.model, name) for name in COMPILED}
    for name, function in eager.items():
        setattr(training.model, name, torch.compile(function, dynamic=True))
    try:
        yield
    finally:
        for name, function in eager.items():
            setattr(training.model, name, function)


def report(model: Model, chosen: list[HeldOutProblem], file: Path, longest: int = 420) -> None:
    """Accuracy with FP8 weights and with NVFP4 MLPs; printed, and written with the wrong responses."""
    result = {}
    for name, nvfp4_layers in (("fp8", False), ("nvfp4", True)):
        with rounded(model, nvfp4_layers):
            result[name] = evaluate(model, chosen, longest)
            if name == "fp8":
                result["continuations"] = continuations(model, CARD_PROMPTS, 64)
    file.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    short = {k: {n: v for n, v in r.items() if n != "wrong"} if isinstance(r, dict) else r for k, r in result.items()}
    print(json.dumps(short, ensure_ascii=False, indent=1), flush=True)


def main() -> None:
    arguments = parse()
    trainer = Trainer(arguments)
    with compiled_parts() if arguments.compile else nullcontext():
        trainer.run()
    if arguments.problems:
        report(trainer.model, problems()[: arguments.problems], arguments.out / "evaluation.json")


if __name__ == "__main__":
    main()
