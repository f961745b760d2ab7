"""Multi-head latent attention: keys and values live in the cache as one compressed latent per token.

    latent c = kv_a_layernorm(kv_a x)[:L], shared rotary key r = rope(kv_a x)[L:]      cached: [c, r], L + R values
    head h:  k_h = [W_UK_h c, r],  v_h = W_UV_h c                  kv_b_proj rows of head h are W_UK_h then W_UV_h

Expanded form, for prompt chunks: compute k_h and v_h of the whole context and attend as usual.
Absorbed form, for a few new tokens: since q_h . (W_UK_h c) = (W_UK_h^T q_h) . c, move W_UK to the query and W_UV
behind the softmax; each head then reads only the latents: (L + R) values a token, whatever the number of heads.

A cache in FP8 holds [c, r] / s where the checkpoint has a scale s for the layer. Scores are linear in what is cached,
and so is what the softmax gives: s goes into the factor of the one and behind the other.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.kernels.recording import beside, cut
from deepseek_fp4_plugin.kernels.spans import Spans
from deepseek_fp4_plugin.kernels.weights import PreparedWeight
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.layers.linear import Linear, column_parallel, row_parallel
from deepseek_fp4_plugin.layers.norm import RMSNorm
from deepseek_fp4_plugin.layers.weight_source import OUT, Cut, WeightSource
from deepseek_fp4_plugin.parallel.mesh import Mesh

LATENT_NORM_EPS = (
    1e-6  # of the two norms inside attention, whatever the config's rms_norm_eps: DeepSeek's own, and transformers'
)


class MLA(nn.Module):
    """Attention of one layer; heads are cut over the tensor-parallel ranks. Output is a partial sum over them.

    observer: called with what the cache would hold of each token, for calibration.
    """

    kv_b_proj: PreparedWeight  # [heads * (nope + v), latent]
    cache_scale: float = 1.0  # of a cache in FP8
    observer: Callable[[Tensor], None] | None = None

    def __init__(self, name: str, config, mesh: Mesh):
        super().__init__()
        c = self.config = config
        self.name, self.tp = name, mesh.tp
        start, stop = mesh.tp.bounds(c.num_attention_heads, f"{name} heads")
        self.heads = stop - start
        q_out = c.num_attention_heads * c.qk_head_dim
        self.q_a_proj = self.q_a_layernorm = self.q_b_proj = self.q_proj = None
        if c.q_lora_rank is None:
            self.q_proj = column_parallel(f"{name}.q_proj", c.hidden_size, q_out, mesh.tp)
        else:
            self.q_a_proj = Linear([f"{name}.q_a_proj"], c.hidden_size, [c.q_lora_rank])
            self.q_a_layernorm = RMSNorm(f"{name}.q_a_layernorm", c.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = column_parallel(f"{name}.q_b_proj", c.q_lora_rank, q_out, mesh.tp)
        self.kv_a_proj_with_mqa = Linear([f"{name}.kv_a_proj_with_mqa"], c.hidden_size, [c.latent_dim])
        self.kv_a_layernorm = RMSNorm(f"{name}.kv_a_layernorm", c.kv_lora_rank, LATENT_NORM_EPS)
        self.o_proj = row_parallel(f"{name}.o_proj", c.num_attention_heads * c.v_head_dim, c.hidden_size, mesh.tp)

    def load(self, source: WeightSource) -> None:
        for part in self.children():
            part.load(source)  # type: ignore[operator]
        self.cache_scale = source.cache_scale(self.name)
        c = self.config
        rows = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
        # Both forms of attention must see the same values, and in the absorbed one no input could be rounded to FP4.
        self.kv_b_proj = source.linear(
            [f"{self.name}.kv_b_proj"], [rows], c.kv_lora_rank, Cut(OUT, self.tp), activations="bf16"
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: ForwardBatch, cache: Tensor | None) -> Tensor:
        """x: [T, hidden].  cos, sin: FP32 [T, rope / 2].  cache: this layer's [blocks, block_size, latent + rope].

        Writes the tokens' latents at batch.slot_mapping, then attends. Returns [T, hidden], this rank's heads' part.
        """
        scale = self.cache_scale if cache is not None and cache.dtype == torch.float8_e4m3fn else 1.0

        split = batch.num_decode_tokens
        absorbed = split > 0 and not batch.groups  # of all tokens, which branches off with the queries
        if absorbed and cache is not None and scale == 1.0:
            together = self._queries_and_latents(x, cos, sin, cache, batch.slot_mapping)
            if together:
                return self.o_proj(self._absorbed(*together, batch, cache, scale).flatten(1))

        def queries() -> tuple[Tensor, Tensor]:
            q_nope, q_rope = self._queries(x)
            if absorbed:
                return ops.absorbed_queries(q_nope, q_rope, self.kv_b_proj, cos, sin)
            return q_nope, ops.rotary(q_rope, cos, sin)

        (q, q_rope), entries = beside(
            x.device, queries, lambda: self._stored(x, cos, sin, cache, batch.slot_mapping, scale)
        )
        outputs = []
        if split:
            assert cache is not None
            q_latent = q if absorbed else ops.absorb(q[:split], self.kv_b_proj)
            outputs.append(self._absorbed(q_latent, q_rope[:split], batch, cache, scale))
        for group in batch.groups:
            rows = group.rows
            context = entries[rows]
            if cache is not None:
                assert group.slots is not None
                context = _times(_gather(cache, group.slots, x.dtype), scale)
            outputs.append(self._expanded(q[rows], q_rope[rows], context, group.spans))
        if len(outputs) == 1:
            attended = outputs[0]
        else:
            attended = torch.cat(outputs) if outputs else q.new_empty(0, self.heads, self.config.v_head_dim)
        return self.o_proj(attended.flatten(1))

    def _queries_and_latents(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Absorbed queries and their rotated parts, latents stored: in few launches, one behind the other. None where
        products have none in common; branches are as good then."""
        q_a, kv_a, norm = self.q_a_proj, self.kv_a_proj_with_mqa, self.kv_a_layernorm
        if q_a is None or q_a.observer or kv_a.observer or self.observer or not self.config.rope_interleave:
            return None
        pair = ops.linear_pair(x, q_a.weight, kv_a.weight)
        if pair is None:
            return None
        assert slots is not None
        queries = self._split(self._from_low(pair[0]))
        return ops.absorb_and_store(*queries, self.kv_b_proj, cos, sin, cache, slots, pair[1], norm.weight, norm.eps)

    def _queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, heads, nope], and [T, heads, rope] to be rotated."""
        return self._split(self.q_proj(x) if self.q_proj else self._from_low(self.q_a_proj(x)))  # type: ignore[misc]

    def _from_low(self, low: Tensor) -> Tensor:
        """Queries from q_a_proj's output."""
        assert self.q_b_proj and self.q_a_layernorm
        return self.q_b_proj.of_norm(self.q_a_layernorm, low)

    def _split(self, q: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        q_nope, q_rope = q.unflatten(-1, (self.heads, -1)).split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        return q_nope, self._pairs(q_rope)

    def _stored(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor | None, slots: Tensor | None, scale: float
    ) -> Tensor:
        """What the cache holds for each token, times `scale`, and from here on does: [T, latent + rope]."""
        norm = self.kv_a_layernorm
        entries = self.kv_a_proj_with_mqa(x)
        if not self.config.rope_interleave:
            latent, rope = entries.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
            entries = torch.cat((latent, self._pairs(rope)), -1)
        if cache is not None and self.observer is None and scale == 1.0:
            assert slots is not None
            return ops.store_latents(cache, slots, entries, norm.weight, norm.eps, cos, sin)
        entries = ops.latent_entries(entries, norm.weight, norm.eps, cos, sin)
        if self.observer is not None:
            self.observer(entries)
        if cache is not None:
            assert slots is not None
            ops.store_entries(cache, slots, _times(entries, 1 / scale))
        return entries

    def _pairs(self, rope: Tensor) -> Tensor:
        """[..., rope] with the values that turn together side by side, as `ops.rotary` wants them.

        They are as published; with `rope_interleave` false value i turns with i + rope / 2. Queries and keys are
        ordered alike, so their products are what they were.
        """
        return rope if self.config.rope_interleave else rope.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, context: Tensor, spans: Spans) -> Tensor:
        c = self.config
        latent, rope = context.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        keys_and_values = ops.linear(latent, self.kv_b_proj).unflatten(-1, (self.heads, -1))
        k_nope, v = keys_and_values.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k = torch.cat((k_nope, rope.unsqueeze(1).expand(-1, self.heads, -1)), -1)
        return ops.expanded_attention(torch.cat((q_nope, q_rope), -1), k, v, c.softmax_scale, spans)

    def _absorbed(
        self, q_latent: Tensor, q_rope: Tensor, batch: ForwardBatch, cache: Tensor, cache_scale: float
    ) -> Tensor:
        assert batch.block_tables is not None and batch.query_start is not None and batch.context_lens is not None
        requests = batch.num_decode_requests
        arguments = (
            q_latent,
            q_rope,
            cache,
            batch.block_tables[:requests],
            batch.query_start,
            batch.context_lens[:requests],
            batch.max_query,
            batch.max_context,
            self.config.softmax_scale * cache_scale,
        )
        if cache_scale == 1.0:
            values = ops.attended_values(*arguments, self.kv_b_proj, self.config.v_head_dim)
            if values is not None:
                return values
        attended = ops.absorbed_attention(*arguments)
        return ops.values_from_latent(_times(attended, cache_scale), self.kv_b_proj, self.config.v_head_dim)


def _times(x: Tensor, factor: float) -> Tensor:
    """x * factor; exact where the factor is a power of two, as our own scales are."""
    return x if factor == 1.0 else cut(lambda y: (y * factor,), x)[0]


def _gather(cache: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Entries of the cache: [S, latent + rope]."""
    raw = cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache  # FP8 tensors cannot be indexed
    return raw.flatten(0, 1).index_select(0, slots).view(cache.dtype).to(dtype)
