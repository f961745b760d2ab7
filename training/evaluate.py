"""Accuracy over the held-out problems by family, and tokens per step with three MTP drafts, in one batch.

python -m training.evaluate [FOLDER] [--nvfp4] [--problems N] [--device cuda] [--json FILE]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deepseek_fp4_plugin.assets.held_out import HeldOutProblem, grade, load_held_out
from training.export import load
from training.model import Model
from training.quantize import round_weights
from training.tokenizer import ASSISTANT, BOS, USER, CharacterEncoder, token_texts

DRAFTS = 3


def chat_prompt(encoder: CharacterEncoder, message: str) -> list[int]:
    """One user turn, as the chat template renders it."""
    special = encoder.special
    return [special[BOS], special[USER], *encoder.encode(message), special[ASSISTANT]]


@torch.inference_mode()
def generate(model: Model, prompts: Sequence[Sequence[int]], longest: int, eos: int = 1) -> list[list[int]]:
    """Greedy continuations of at most `longest` tokens, all prompts side by side, one position a step."""
    device, total = model.lm_head.device, max(map(len, prompts)) + longest
    c, count = model.config, len(prompts)
    tokens = torch.full((count, total), eos, device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
    heads = c.num_attention_heads
    keys = torch.empty(len(model.layers), count, heads, total, c.qk_head_dim, device=device, dtype=model.dtype)
    values = torch.empty(len(model.layers), count, heads, total, c.v_head_dim, device=device, dtype=model.dtype)
    done = torch.zeros(count, dtype=torch.bool, device=device)
    for at in range(total - 1):
        x = model.embed(tokens[:, at : at + 1])
        cos, sin = model.angles(torch.full((count, 1), at, device=device))
        for index, layer in enumerate(model.layers):
            q, k, v = layer.queries(x, cos, sin)
            keys[index, :, :, at], values[index, :, :, at] = k.squeeze(2), v.squeeze(2)
            x = layer.finish(x, q, keys[index, :, :, : at + 1], values[index, :, :, : at + 1], None)
        best = model.logits(model.norm(x)).argmax(-1).squeeze(1)
        own = (at + 1 >= lengths) & ~done
        tokens[:, at + 1] = torch.where(own, best, tokens[:, at + 1])
        done |= own & (best == eos) | (at + 2 - lengths >= longest)
        if at % 16 == 0 and bool(done.all()):
            break
    outputs = []
    for row, prompt in enumerate(prompts):
        output = tokens[row, len(prompt) : len(prompt) + longest].tolist()
        outputs.append(output[: output.index(eos) + 1] if eos in output else output)
    return outputs


@torch.inference_mode()
def tokens_per_step(model: Model, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> float:
    """Mean tokens a verification step emits with DRAFTS drafts under the strict rule, by teacher forcing."""
    emitted = steps = 0
    for first in range(0, len(prompts), 64):
        rows = [[*p, *o] for p, o in zip(prompts[first : first + 64], outputs[first : first + 64], strict=True)]
        length = max(map(len, rows))
        ids = torch.tensor([row + [1] * (length - len(row)) for row in rows], device=model.lm_head.device)
        positions = torch.arange(length, device=ids.device).expand_as(ids)
        documents = torch.zeros_like(ids)
        hidden = model(ids, positions, documents)
        drafts = [model.logits(m).argmax(-1) for m in model.drafts(hidden, ids, positions, documents, DRAFTS)]
        table = torch.stack(drafts, -1).cpu()
        for row, prompt, drafted in zip(rows, prompts[first : first + 64], table, strict=True):
            at = len(prompt) - 1  # last verified position; the token behind it is known
            while at + 2 < len(row):
                accepted = 0
                while (
                    accepted < DRAFTS
                    and at + 3 + accepted < len(row)
                    and int(drafted[at, accepted]) == row[at + 2 + accepted]
                ):
                    accepted += 1
                emitted, steps, at = emitted + accepted + 1, steps + 1, at + accepted + 1
    return emitted / max(steps, 1)


def evaluate(model: Model, problems: Sequence[HeldOutProblem], longest: int = 420) -> dict[str, Any]:
    """Accuracy in percent (`all` and by family), tokens per step, mean response length, and wrong responses."""
    model.eval()
    encoder, texts = CharacterEncoder(), token_texts()
    texts += [""] * (model.config.vocab_size - len(texts))
    prompts = [chat_prompt(encoder, problem.prompt) for problem in problems]
    outputs = generate(model, prompts, longest)
    right: dict[str, list[bool]] = {}
    wrong = []
    for problem, output in zip(problems, outputs, strict=True):
        text = "".join(texts[token] for token in output)
        correct = grade(problem.answer, text)
        right.setdefault(problem.family, []).append(correct)
        if not correct:
            wrong.append({"family": problem.family, "prompt": problem.prompt, "answer": problem.answer, "text": text})
    every = [correct for family in right.values() for correct in family]
    return {
        "all": 100 * sum(every) / len(every),
        "families": {family: 100 * sum(some) / len(some) for family, some in right.items()},
        "tokens_per_step": tokens_per_step(model, prompts, outputs),
        "mean_response_tokens": sum(map(len, outputs)) / len(outputs),
        "wrong": wrong,
    }


def continuations(model: Model, prompts: Sequence[str], longest: int) -> list[str]:
    """Greedy continuations of plain text."""
    encoder, texts = CharacterEncoder(), token_texts()
    texts += [""] * (model.config.vocab_size - len(texts))
    return ["".join(texts[t] for t in o) for o in generate(model, [encoder.encode(p) for p in prompts], longest)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[1] / "deepseek_fp4_plugin/assets/r1_nano"
    parser.add_argument("folder", nargs="?", type=Path, default=default, help="an exported checkpoint")
    parser.add_argument("--nvfp4", action="store_true", help="round the MLPs to NVFP4 first")
    parser.add_argument("--problems", type=int, default=None, help="only the first N")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=None, help="write the result, wrong responses included")
    arguments = parser.parse_args()
    model = load(arguments.folder).to(arguments.device)
    if arguments.nvfp4:
        round_weights(model, nvfp4_layers=True)
    result = evaluate(model, load_held_out()[: arguments.problems])
    if arguments.json:
        arguments.json.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "wrong"}, indent=1))


if __name__ == "__main__":
    main()
