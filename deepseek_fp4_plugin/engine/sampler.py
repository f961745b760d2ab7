"""From logits to target tokens: penalties, biases, masks, then argmax or a draw.

A draw is an inverse-CDF look-up with a random number that depends on the request's seed and the token's position alone,
never on the batch, on chunking or on speculation; so a seeded request gives the same tokens in any company.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepseek_fp4_plugin.engine.slots import Slots
from deepseek_fp4_plugin.engine.step_plan import Logprob, PlanRow, Sampling, TokenLogprobs

# Candidates looked at before the whole vocabulary is sorted; for most distributions they hold all of top-p.
_CANDIDATES = 256


def is_plain(row: PlanRow, sampling: Sampling) -> bool:
    """Whether nothing is done to the row's logits before a token is chosen."""
    return not (sampling.penalized or sampling.logit_bias or row.banned or row.masks is not None)


def process(logits: Tensor, row: PlanRow, sampling: Sampling) -> None:
    """Apply a row's penalties, bias, bans and grammar to its logits, FP32 [drafts + 1, vocab], in place.

    Logits that are not finite stay so, whatever is forbidden.
    """
    device = logits.device
    broken = ~logits.amax(-1, keepdim=True).isfinite()
    if sampling.penalized:
        _penalize(logits, row, sampling)
    if sampling.logit_bias:
        ids, values = zip(*sampling.logit_bias, strict=True)
        logits[:, torch.tensor(ids, device=device)] += torch.tensor(values, device=device)
    for position, ids in enumerate(row.banned):
        logits[position].index_fill_(0, torch.tensor(ids, dtype=torch.int64, device=device), -torch.inf)
    if row.masks is not None:
        bits = np.unpackbits(row.masks.view(np.uint8), axis=1, bitorder="little")[:, : logits.shape[1]]
        allowed = torch.from_numpy(bits).to(device, torch.bool)
        logits[:, : allowed.shape[1]].masked_fill_(~allowed, -torch.inf)
        logits[:, allowed.shape[1] :] = -torch.inf
    logits.masked_fill_(broken, torch.nan)


def _penalize(logits: Tensor, row: PlanRow, s: Sampling) -> None:
    known = len(row.history) - row.num_drafts
    for position in range(row.num_drafts + 1):
        history = row.history[: known + position]
        seen = torch.tensor(sorted(set(history)), device=logits.device)
        values = logits[position, seen]
        logits[position, seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
        counts = Counter(history[row.num_prompt_tokens :])
        if counts:
            emitted = torch.tensor(list(counts), device=logits.device)
            often = torch.tensor(list(counts.values()), device=logits.device)
            logits[position, emitted] -= s.presence_penalty + s.frequency_penalty * often


def sample(
    logits: Tensor, best: Tensor, slots: Slots, slot_of: Tensor, positions: Tensor, random: Tensor, reads: bool
) -> Tensor:
    """Target tokens, int64 [N], of processed logits, FP32 [N, vocab].

    best: int64 [N], their argmax.  slot_of, positions: int64 [N], the row's slot, and where its token will lie.
    random: rows that may be drawn.  reads: whether the host may look at what the device computes; see `draw`.
    """
    slot, where = slot_of[random], positions[random]
    drawn = draw(
        logits[random],
        slots.temperature[slot],
        slots.top_k[slot],
        slots.top_p[slot],
        slots.min_p[slot],
        uniform(slots.seeds[slot], where),
        reads,
    )
    return best.index_put((random,), torch.where(slots.greedy[slot], best[random], drawn))


def greatest(logits: Tensor, targets: Tensor, random: Tensor | None) -> Tensor:
    """Each row's greatest logit, FP32 [N]; a target means nothing where it is NaN or infinite.

    -inf: every token is forbidden. Else the model's own logits are not finite.
    """
    if random is None:  # then it lies at the target, NaN before all others
        return logits.gather(1, targets.unsqueeze(1)).squeeze(1).float()
    return logits.amax(-1)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Float64 in [0, 1) from (seed, position), both int64 with an unsigned number's bits: splitmix64's finalizer over
    their mix. Products and sums wrap."""
    z = _splitmix(seeds) ^ (positions * _GOLDEN)
    return _shifted(_splitmix(z), 11).double() * 2.0**-53


_GOLDEN, _FIRST, _SECOND = (
    n - (1 << 64) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # as signed numbers


def _splitmix(z: Tensor) -> Tensor:
    z = z + _GOLDEN
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Right, with zeros from the left."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def draw(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor, reads: bool = True
) -> Tensor:
    """Tokens, int64 [N], from softmax(logits / temperature) cut by top-k, then top-p (renormalized), and min-p.

    logits: FP32 [N, vocab].  top_k: 0 is all.  u: FP64 [N], uniform in [0, 1).
    reads: first look at the best candidates only, and at the whole vocabulary where they were not enough, which the
    host must see. Else every row is sorted whole, without a word from the device: the same draws,
    but that equal logits may come in another order.
    """
    scaled = logits / temperature.unsqueeze(1)
    normalizer = scaled.logsumexp(-1, keepdim=True)
    whole = (top_k == 0) & (top_p >= 1.0) & (min_p <= 0.0)
    if not reads:
        uncut = _look_up((scaled - normalizer).exp().double().cumsum(-1), u)
        return torch.where(whole, uncut, _cut(scaled, normalizer, top_k, top_p, min_p, u, logits.shape[1])[0])
    vocab = logits.shape[1]
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if whole.any():
        cdf = (scaled[whole] - normalizer[whole]).exp().double().cumsum(-1)
        tokens[whole] = _look_up(cdf, u[whole])
    cut = (~whole).nonzero().squeeze(1)
    width = min(_CANDIDATES, vocab)
    while len(cut):
        some, done = _cut(scaled[cut], normalizer[cut], top_k[cut], top_p[cut], min_p[cut], u[cut], width)
        tokens[cut[done]] = some[done]
        cut, width = cut[~done], vocab
    return tokens


def _cut(
    scaled: Tensor, normalizer: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """Tokens drawn from the `width` best, and whether no other could have been kept."""
    vocab = scaled.shape[1]
    values, ids = scaled.topk(width)
    p = (values - normalizer).exp().double()
    k = torch.where(top_k == 0, vocab, top_k).unsqueeze(1)
    keep = torch.arange(width, device=scaled.device) < k
    mass = torch.where(k < width, (p * keep).sum(-1, keepdim=True), 1.0)  # top-k's, for which top-p renormalizes
    limit = top_p.unsqueeze(1) * mass
    before = p.cumsum(-1) - p
    keep &= (before < limit) & (p >= min_p.unsqueeze(1) * p[:, :1])
    keep[:, 0] = True
    # Where the last candidate is still kept, the cut may lie further on.
    done = (~keep[:, -1] & ((top_k == 0) | (top_k < width))) | (width == vocab)
    chosen = _look_up((p * keep).cumsum(-1), u)
    return ids.gather(1, chosen.unsqueeze(1)).squeeze(1), done


def _look_up(cdf: Tensor, u: Tensor) -> Tensor:
    """First index at which an unnormalized cdf, FP64 [N, M], exceeds u of its total; any index where that is NaN."""
    total = cdf[:, -1]
    below = total.nextafter(torch.zeros_like(total))  # u just under 1 may round up to all of it
    return (
        torch.searchsorted(cdf, (u * total).minimum(below).unsqueeze(1), right=True)
        .squeeze(1)
        .clamp(max=cdf.shape[1] - 1)
    )


class LogprobTensors(NamedTuple):
    """Log-probabilities and ranks [N] of chosen tokens; ids and values [N, count] of the best."""

    logprobs: Tensor
    ranks: Tensor
    ids: Tensor
    values: Tensor

    def entries(self, chosen: Sequence[int]) -> list[TokenLogprobs]:
        """For the first len(chosen) rows; waits for the device."""
        result: list[TokenLogprobs] = []
        rows = zip(chosen, *(tensor.tolist() for tensor in self), strict=False)
        for token, value, rank, ids, values in rows:
            entry = {token: Logprob(value, rank)}
            for place, (other, its) in enumerate(zip(ids, values, strict=True), start=1):
                entry.setdefault(other, Logprob(its, place))
            result.append(entry)
        return result


def token_logprobs(logits: Tensor, chosen: Tensor, count: int) -> LogprobTensors:
    """Of each chosen token, int64 [N], and of the `count` best. logits: raw FP32 [N, vocab]."""
    logp = logits.log_softmax(-1)
    picked = logp.gather(1, chosen.unsqueeze(1))
    best = logp.topk(min(count, logits.shape[1]))
    return LogprobTensors(picked.squeeze(1), (logp > picked).sum(-1) + 1, best.indices, best.values)
