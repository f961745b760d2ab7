"""The trainable model: DeepSeek-V3 in batched form, numerically the package's model, with experts in grouped products.

Sequences are rows [B, L] that hold several documents each; a token sees its own document only. Master weights are
FP32, products run in `dtype`. The MTP layer is unrolled as it will be used: step 1 reads the target's hidden states,
each further step reads the step before, and attends to step 1's keys up to where the chain began plus the chain's own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_fp4_plugin.kernels.reference import cos_sin
from deepseek_fp4_plugin.layers.rotary import inverse_frequencies
from deepseek_fp4_plugin.models.config import DeepseekV3Config


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in x's dtype."""
    return F.linear(x, weight.to(x.dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return weight.to(x.dtype) * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [B, L, heads, d], adjacent pairs.  cos, sin: FP32 [B, L, 1, d / 2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 I]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def choose(logits: Tensor, bias: Tensor, c: DeepseekV3Config) -> tuple[Tensor, Tensor]:
    """Group-limited choice of experts by biased scores, weights from unbiased ones: ids and weights [T, k]."""
    scores = logits.sigmoid()
    with torch.no_grad():
        grouped = (scores + bias).unflatten(-1, (c.n_group, -1))
        best = grouped.amax(-1, keepdim=True)
        others = torch.where(grouped == best, float("-inf"), grouped).amax(-1)  # the second best, scores being distinct
        group_score = best.squeeze(-1) + others
        # A group is kept when fewer than topk_group others are better.
        rank = (group_score.unsqueeze(-2) > group_score.unsqueeze(-1)).sum(-1)
        choice = torch.where((rank < c.topk_group).unsqueeze(-1), grouped, float("-inf")).flatten(-2)
        ids = choice.topk(c.num_experts_per_tok, -1, sorted=False).indices
    weights = scores.gather(1, ids)
    if c.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * c.routed_scaling_factor


def weighted_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """[T, k, hidden] and FP32 [T, k] to [T, hidden], summed in FP32."""
    return (rows.float() * weights.unsqueeze(-1)).sum(1).to(rows.dtype)


def _matrix(*shape: int, gain: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * (gain * shape[-1] ** -0.5))


class Norm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """MLA in expanded form."""

    def __init__(self, c: DeepseekV3Config, gain: float):
        super().__init__()
        assert c.q_lora_rank is not None
        self.config = c
        self.q_a_proj = _matrix(c.q_lora_rank, c.hidden_size)
        self.q_a_layernorm = Norm(c.q_lora_rank, c.rms_norm_eps)
        self.q_b_proj = _matrix(c.num_attention_heads * c.qk_head_dim, c.q_lora_rank)
        self.kv_a_proj_with_mqa = _matrix(c.latent_dim, c.hidden_size)
        self.kv_a_layernorm = Norm(c.kv_lora_rank, c.rms_norm_eps)
        self.kv_b_proj = _matrix(c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
        self.o_proj = _matrix(c.hidden_size, c.num_attention_heads * c.v_head_dim, gain=gain)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, hidden] to queries and keys [B, heads, L, nope + rope] and values [B, heads, L, v]."""
        c, heads = self.config, self.config.num_attention_heads
        q = linear(self.q_a_layernorm(linear(x, self.q_a_proj)), self.q_b_proj).unflatten(-1, (heads, -1))
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent, k_rope = linear(x, self.kv_a_proj_with_mqa).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = linear(self.kv_a_layernorm(latent), self.kv_b_proj).unflatten(-1, (heads, -1))
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k_rope = rotary(k_rope.unsqueeze(2), cos, sin).expand(-1, -1, heads, -1)
        q = torch.cat((q_nope, rotary(q_rope, cos, sin)), -1)
        k = torch.cat((k_nope, k_rope), -1)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """bias: [B, 1, L, S], 0 where a key is seen and -inf elsewhere; None where all are. Returns [B, L, hidden]."""
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.config.softmax_scale)
        return linear(output.transpose(1, 2).flatten(2), self.o_proj)


class Gather(torch.autograd.Function):
    """x[index // k] whose backward is a gather too: `inverse` undoes `index`, a permutation of k copies of the rows."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[index // k]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class Embed(torch.autograd.Function):
    """weight[ids] whose backward is one product: adding up rows of a few hot tokens one by one takes far longer."""

    @staticmethod
    def forward(ctx, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.vocab = weight.shape[0]
        return weight[ids]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (ids,) = ctx.saved_tensors
        hot = torch.zeros(ids.numel(), ctx.vocab, dtype=grad.dtype, device=grad.device)
        hot.scatter_(1, ids.reshape(-1, 1), 1)
        return hot.T @ grad.flatten(0, 1), None


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int, gain: float):
        super().__init__()
        self.gate_up_proj = _matrix(2 * inner, hidden)
        self.down_proj = _matrix(hidden, inner, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        return linear(gated(linear(x, self.gate_up_proj)), self.down_proj)


class MoE(nn.Module):
    """Routed experts as grouped products over rows sorted by expert, plus the shared expert."""

    bias: Tensor
    load: Tensor

    def __init__(self, c: DeepseekV3Config, gain: float):
        super().__init__()
        self.config = c
        experts, inner = c.n_routed_experts, c.moe_intermediate_size
        self.gate = _matrix(experts, c.hidden_size)
        self.gate_up_proj = _matrix(experts, 2 * inner, c.hidden_size)
        self.down_proj = _matrix(experts, c.hidden_size, inner, gain=gain)
        self.shared_experts = MLP(c.hidden_size, inner * c.n_shared_experts, gain)
        self.register_buffer("bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape, x.flatten(0, 1)
        c, k = self.config, self.config.num_experts_per_tok
        logits = F.linear(x.float(), self.gate.float())
        ids, weights = choose(logits, self.bias, c)
        flat = ids.flatten()
        order = flat.argsort()
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        count = _count(flat, self.bias)
        if self.training:
            self.load += count
        ends = count.cumsum(0, dtype=torch.int32)
        rows = Gather.apply(x, order, inverse, k)
        inner = gated(grouped(rows, self.gate_up_proj, ends))
        outputs = grouped(inner, self.down_proj, ends)
        by_token = Gather.apply(outputs, inverse, order, 1).unflatten(0, (-1, k))
        return (weighted_sum(by_token, weights) + self.shared_experts(x)).view(shape)

    @torch.no_grad()
    def balance(self, speed: float) -> None:
        """Move the bias against the load since the last call. Source: arXiv 2408.15664."""
        self.bias += speed * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


def grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows sorted by expert times each expert's W^T: [N, in] and [E, out, in] to [N, out]; expert e ends at ends[e]."""
    weight = weight.to(rows.dtype)
    if rows.device.type == "cuda" and rows.dtype == torch.bfloat16:
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    # Elsewhere the platform's own grouped product is many times slower than one product for each expert.
    parts = rows.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    return torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, weight, strict=True) if len(part)])


def _count(ids: Tensor, like: Tensor) -> Tensor:
    """How many of `ids` name each expert, without asking the device for sizes."""
    return torch.zeros(like.shape, dtype=torch.int64, device=like.device).scatter_add_(0, ids, torch.ones_like(ids))


class Layer(nn.Module):
    def __init__(self, c: DeepseekV3Config, moe: bool):
        super().__init__()
        gain = (2 * c.num_hidden_layers) ** -0.5
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, gain)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MoE(c, gain) if moe else MLP(c.hidden_size, c.intermediate_size, gain)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def finish(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        x = x + self.self_attn.attend(q, k, v, bias)
        return x + self.mlp(self.post_attention_layernorm(x))


class MTP(nn.Module):
    def __init__(self, c: DeepseekV3Config):
        super().__init__()
        self.enorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.hnorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.eh_proj = _matrix(c.hidden_size, 2 * c.hidden_size)
        self.layer = Layer(c, moe=True)
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)

    def queries(self, embedded: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        x = linear(torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1), self.eh_proj)
        return x, *self.layer.queries(x, cos, sin)

    def finish(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return self.norm(self.layer.finish(x, q, k, v, bias))


class Model(nn.Module):
    """See the file's text. `dtype`: of activations and products."""

    def __init__(self, config: DeepseekV3Config, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        assert config.rope_scaling is None or config.rope_scaling.mscale == config.rope_scaling.mscale_all_dim
        self.config, self.dtype = config, dtype
        self.embed_tokens = nn.Parameter(torch.randn(config.vocab_size, config.hidden_size) * 0.1)
        self.layers = nn.ModuleList(Layer(config, config.is_moe_layer(i)) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Parameter(torch.randn(config.vocab_size, config.hidden_size) * 0.01)
        self.mtp = MTP(config)
        frequencies = inverse_frequencies(config.qk_rope_head_dim, config.rope_theta, config.rope_scaling)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos_sin(positions, self.frequencies)
        return cos.unsqueeze(2), sin.unsqueeze(2)

    def embed(self, ids: Tensor) -> Tensor:
        return Embed.apply(self.embed_tokens.to(self.dtype), ids)

    def logits(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.lm_head).float()

    def forward(self, ids: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        """int64 [B, L] each; documents: a number for each document of a row.  Hidden states after the final norm."""
        x = self.embed(ids)
        cos, sin = self.angles(positions)
        bias = self.visible(documents)
        for layer in self.layers:
            x = layer.finish(x, *layer.queries(x, cos, sin), bias)
        return self.norm(x)

    def visible(self, documents: Tensor) -> Tensor:
        """Attention bias [B, 1, L, L] of causal attention within documents."""
        length = documents.shape[1]
        seen = documents.unsqueeze(2) == documents.unsqueeze(1)
        seen &= torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
        zero = torch.zeros((), dtype=self.dtype, device=documents.device)
        return torch.where(seen, zero, float("-inf")).unsqueeze(1)

    def drafts(self, hidden: Tensor, ids: Tensor, positions: Tensor, documents: Tensor, steps: int) -> list[Tensor]:
        """The MTP layer's outputs of `steps` recurrent steps, each [B, L, hidden].

        Output number i (from 0) at column t predicts token t + 2 + i, having read tokens up to t + 1 + i; columns whose
        tokens leave the row or the document mean nothing.
        """
        length = ids.shape[1]
        bias = self.visible(documents)
        own = torch.full((length, length), float("-inf"), dtype=self.dtype, device=ids.device).fill_diagonal_(0)
        keys, values, outputs = [], [], []
        for step in range(steps):
            embedded = self.embed(torch.cat((ids[:, 1 + step :], ids[:, : 1 + step]), 1))
            x, q, k, v = self.mtp.queries(embedded, hidden, *self.angles(positions + step))
            keys.append(k)
            values.append(v)
            mask = torch.cat((bias, *[own.expand_as(bias)] * step), -1)
            hidden = self.mtp.finish(x, q, torch.cat(keys, 2), torch.cat(values, 2), mask)
            outputs.append(hidden)
        return outputs
