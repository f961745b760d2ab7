"""From logits to target tokens: penalties, biases, masks, then argmax or a draw.

A draw is an inverse-CDF look-up with a random number that depends on the request's seed and the token's position alone,
never on the batch, on chunking or on speculation; so a seeded request gives the same tokens in any company.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deepseek_fp4_plugin.engine.step_plan import Logprob, PlanRow, TokenLogprobs

# Candidates looked at before the whole vocabulary is sorted; for most distributions they hold all of top-p.
_CANDIDATES = 256


def is_plain(row: PlanRow) -> bool:
    """Whether the row's target tokens are the argmax of its raw logits."""
    s = row.sampling
    return s.greedy and not (s.penalized or s.logit_bias or row.banned or row.masks is not None)


def process(logits: Tensor, row: PlanRow) -> None:
    """Apply a row's penalties, bias, bans and grammar to its logits, FP32 [drafts + 1, vocab], in place.

    Logits that are not finite stay so, whatever is forbidden.
    """
    s = row.sampling
    broken = ~logits.amax(-1, keepdim=True).isfinite()
    if s.penalized:
        _penalize(logits, row)
    if s.logit_bias:
        ids, values = zip(*s.logit_bias, strict=True)
        logits[:, list(ids)] += torch.tensor(values, device=logits.device)
    for position, ids in enumerate(row.banned):
        logits[position, list(ids)] = -torch.inf
    if row.masks is not None:
        bits = np.unpackbits(row.masks.view(np.uint8), axis=1, bitorder="little")[:, : logits.shape[1]]
        allowed = torch.from_numpy(bits).to(logits.device, torch.bool)
        logits[:, : allowed.shape[1]].masked_fill_(~allowed, -torch.inf)
        logits[:, allowed.shape[1] :] = -torch.inf
    logits.masked_fill_(broken, torch.nan)


def _penalize(logits: Tensor, row: PlanRow) -> None:
    s = row.sampling
    drafts = list(row.tokens[len(row.tokens) - row.num_drafts :])
    for position in range(row.num_drafts + 1):
        history = [*row.history, *drafts[:position]]
        seen = torch.tensor(sorted(set(history)), device=logits.device)
        values = logits[position, seen]
        logits[position, seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
        output = history[row.num_prompt_tokens :]
        if output:
            emitted, counts = torch.tensor(output, device=logits.device).unique(return_counts=True)
            logits[position, emitted] -= s.presence_penalty + s.frequency_penalty * counts


def sample(logits: Tensor, rows: Sequence[PlanRow], bases: Sequence[int]) -> Tensor:
    """Target tokens, int64 [N], of processed logits, FP32 [N, vocab]. Row r's logits begin at bases[r]."""
    targets = logits.argmax(-1)
    random = [(row, base) for row, base in zip(rows, bases, strict=True) if not row.sampling.greedy]
    if not random:
        return targets
    counts = [row.num_drafts + 1 for row, _ in random]

    def each(values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(torch.tensor(counts)).to(logits.device)

    where = torch.cat([torch.arange(base, base + n) for (_, base), n in zip(random, counts, strict=True)])
    samplings = [row.sampling for row, _ in random]
    # The position of the token being drawn: one behind the row's own.
    positions = [np.arange(n) + row.start + len(row.tokens) - row.num_drafts for (row, _), n in zip(random, counts)]  # noqa: B905
    seeds = np.repeat(np.array([s.seed for s in samplings], dtype=np.uint64), counts)
    targets[where] = draw(
        logits[where],
        each([s.temperature for s in samplings], torch.float32),
        each([s.top_k for s in samplings], torch.int64),
        each([s.top_p for s in samplings], torch.float64),
        each([s.min_p for s in samplings], torch.float64),
        torch.from_numpy(uniform(seeds, np.concatenate(positions).astype(np.uint64))).to(logits.device),
    )
    return targets


def greatest(logits: Tensor, targets: Tensor, rows: Sequence[PlanRow]) -> Tensor:
    """Each row's greatest processed logit, FP32 [N]; a target means nothing where it is NaN or infinite.

    -inf: every token is forbidden. Else the model's own logits are not finite.
    """
    if all(row.sampling.greedy for row in rows):  # then it lies at the target, NaN before all others
        return logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    return logits.amax(-1)


def uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Float64 in [0, 1) from (seed, position), both uint64: splitmix64's finalizer over their mix."""
    with np.errstate(over="ignore"):
        z = _splitmix(seeds) ^ (positions * np.uint64(0x9E3779B97F4A7C15))
        return (_splitmix(z) >> np.uint64(11)) * 2.0**-53


def _splitmix(z: np.ndarray) -> np.ndarray:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor) -> Tensor:
    """Tokens, int64 [N], from softmax(logits / temperature) cut by top-k, then top-p (renormalized), and min-p.

    logits: FP32 [N, vocab].  top_k: 0 is all.  u: FP64 [N], uniform in [0, 1).
    """
    vocab = logits.shape[1]
    scaled = logits / temperature.unsqueeze(1)
    normalizer = scaled.logsumexp(-1, keepdim=True)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    whole = (top_k == 0) & (top_p >= 1.0) & (min_p <= 0.0)
    if whole.any():
        cdf = (scaled[whole] - normalizer[whole]).exp().double().cumsum(-1)
        tokens[whole] = _look_up(cdf, u[whole])
    cut = (~whole).nonzero().squeeze(1)
    width = min(_CANDIDATES, vocab)
    while len(cut):
        values, ids = scaled[cut].topk(width)
        p = (values - normalizer[cut]).exp().double()
        k = torch.where(top_k[cut] == 0, vocab, top_k[cut]).unsqueeze(1)
        keep = torch.arange(width, device=logits.device) < k
        mass = torch.where(k < width, (p * keep).sum(-1, keepdim=True), 1.0)  # top-k's, for which top-p renormalizes
        limit = top_p[cut].unsqueeze(1) * mass
        before = p.cumsum(-1) - p
        keep &= (before < limit) & (p >= min_p[cut].unsqueeze(1) * p[:, :1])
        keep[:, 0] = True
        # Where the last candidate is still kept, the cut may lie further on: look at more of the vocabulary.
        done = (~keep[:, -1] & ((top_k[cut] == 0) | (top_k[cut] < width))) | (width == vocab)
        chosen = _look_up((p * keep).cumsum(-1), u[cut])
        tokens[cut[done]] = ids.gather(1, chosen.unsqueeze(1)).squeeze(1)[done]
        cut, width = cut[~done], vocab
    return tokens


def _look_up(cdf: Tensor, u: Tensor) -> Tensor:
    """First index at which an unnormalized cdf, FP64 [N, M], exceeds u of its total; any index where that is NaN."""
    total = cdf[:, -1]
    below = total.nextafter(torch.zeros_like(total))  # u just under 1 may round up to all of it
    return (
        torch.searchsorted(cdf, (u * total).minimum(below).unsqueeze(1), right=True)
        .squeeze(1)
        .clamp(max=cdf.shape[1] - 1)
    )


def token_logprobs(logits: Tensor, chosen: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Log-probabilities of each chosen token and of the `count` best. logits: raw FP32 [N, vocab], N = len(chosen)."""
    logp = logits.log_softmax(-1)
    picked = logp.gather(1, torch.tensor(chosen, device=logits.device).unsqueeze(1))
    ranks = ((logp > picked).sum(-1) + 1).tolist()
    best = logp.topk(min(count, logits.shape[1])) if count else None
    result = []
    for row, token in enumerate(chosen):
        entry = {token: Logprob(picked[row].item(), ranks[row])}
        if best is not None:
            pairs = zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True)
            for rank, (other, value) in enumerate(pairs, start=1):
                entry.setdefault(other, Logprob(value, rank))
        result.append(entry)
    return result
