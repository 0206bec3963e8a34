"""A language model of today's kind in Flax nnx, and what its training needs: a GPT.

A decoder-only transformer: rotary positions, RMSNorm before each branch, a gated MLP, no biases,
the embedding also gives the logits. The layers are one stack of parameters, [depth, ...] each, and
one loop runs over them. So a model of 32 layers is traced and compiled as fast as one of 2.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class Size(NamedTuple):
    """The size of a model: features, layers, vocabulary, and tokens of an example."""

    width: int
    depth: int
    vocabulary: int
    length: int

    @property
    def heads(self) -> int:
        """Attention heads: of 64 features, of 128 in a wide model, or a single small one."""
        return max(1, self.width // (128 if self.width >= 2048 else 64))

    @property
    def hidden(self) -> int:
        """Features inside the MLP: 8/3 of the width, rounded up to a multiple of 32, or of 256."""
        unit = 256 if self.width >= 768 else 32
        return unit * math.ceil(8 * self.width / 3 / unit)


SIZES = {
    "100M": Size(width=768, depth=12, vocabulary=32_768, length=1024),
    "1B": Size(width=2048, depth=18, vocabulary=32_768, length=2048),
    "7B": Size(width=4096, depth=32, vocabulary=32_768, length=2048),
}


class Block(nnx.Module):
    """One layer: attention, then a gated MLP, each in a residual branch."""

    def __init__(self, size: Size, *, lora_rank: int = 0, rngs: nnx.Rngs, **dtypes: Any):
        layer = nnx.Linear
        if lora_rank:
            lora_dtypes = {f"lora_{name}": value for name, value in dtypes.items()}
            layer = partial(nnx.LoRALinear, lora_rank=lora_rank, **lora_dtypes)
        linear = partial(layer, use_bias=False, rngs=rngs, **dtypes)
        norm = partial(nnx.RMSNorm, size.width, rngs=rngs, **dtypes)
        into_stream = nnx.initializers.variance_scaling(0.5 / size.depth, "fan_in", "normal")
        self.heads = size.heads
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.query_key_value = linear(size.width, 3 * size.width)
        self.attention_out = linear(size.width, size.width, kernel_init=into_stream)
        self.gate_up = linear(size.width, 2 * size.hidden)
        self.down = linear(size.hidden, size.width, kernel_init=into_stream)

    def __call__(self, x):  # noqa: D102
        qkv = self.query_key_value(self.attention_norm(x))
        qkv = qkv.reshape(*x.shape[:-1], 3, self.heads, -1)
        query, key, value = (qkv[..., i, :, :] for i in range(3))
        mixed = attention(rotated(query), rotated(key), value)
        x += self.attention_out(mixed.reshape(x.shape))
        gate, up = jnp.split(self.gate_up(self.mlp_norm(x)), 2, axis=-1)
        return x + self.down(jax.nn.silu(gate) * up)


class GPT(nnx.Module):
    """The model: `tokens`, int[B, T], to logits, float[B, T, vocabulary].

    Args:
        size: Its size.
        remat: Whether only the input of each layer is stored for the backward pass, and all that is
            inside is computed again. Otherwise the results of products are stored, and what costs
            little is computed again.
        gather: `params -> params`, called with the parameters of a layer before it is used. Under
            FSDP it gathers their parts. A backward pass gathers them again.
        lora_rank: Rank of an adapter beside each matrix of the layers; 0 for none. An adapter adds
            `x @ lora_a @ lora_b`. Its parameters have the type `nnx.LoRAParam`.
        rngs: The random key of the initial parameters.
        dtype: Dtype of the computation. Logits are at least float32.
        param_dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        size: Size,
        *,
        remat: bool = False,
        gather: Callable[[Any], Any] | None = None,
        lora_rank: int = 0,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}

        @nnx.split_rngs(splits=size.depth)
        @nnx.vmap
        def stack(rngs):
            return Block(size, lora_rank=lora_rank, rngs=rngs, **dtypes)

        self.gather = gather
        self.remat = remat
        self.embedding = nnx.Embed(
            size.vocabulary,
            size.width,
            rngs=rngs,
            embedding_init=nnx.initializers.normal(0.02),
            **dtypes,
        )
        self.blocks = stack(rngs)
        self.norm = nnx.RMSNorm(size.width, rngs=rngs, **dtypes)

    def __call__(self, tokens):  # noqa: D102
        embedding = self.whole(self.embedding)  # once, for both of its uses
        return self.head(self.features(tokens, embedding), embedding)

    def features(self, tokens: jax.Array, embedding: Any = None) -> jax.Array:
        """Return what the head gets: float[B, T, width], after the last norm."""

        def layer(x, block):
            return self.whole(block)(x)

        policy = None if self.remat else jax.checkpoint_policies.dots_saveable
        layer = nnx.remat(layer, prevent_cse=False, policy=policy)
        layers = nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        embedding = embedding or self.whole(self.embedding)
        return self.norm(layers(embedding(tokens), self.blocks))

    def head(self, features: jax.Array, embedding: Any = None) -> jax.Array:
        """Return the logits of the features, by the embedding."""
        logits = (embedding or self.whole(self.embedding)).attend(features)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    def whole(self, module: nnx.Module) -> Any:
        """Return a module with gathered parameters."""
        if self.gather is None:
            return module
        graph, params = nnx.split(module)
        return nnx.merge(graph, self.gather(params))


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Return causal attention: each position mixes the values up to its own; [B, T, heads, F].

    The softmax is at least in float32. `jax.nn.dot_product_attention` has it in float32 always, and
    float64 would be lost.
    """
    scores = jnp.einsum("bqhf,bkhf->bhqk", query, key) * query.shape[-1] ** -0.5
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    later = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
    earlier = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 3)
    weights = jax.nn.softmax(jnp.where(later >= earlier, scores, -jnp.inf))
    return jnp.einsum("bhqk,bkhf->bqhf", weights.astype(value.dtype), value)


def rotated(x: jax.Array) -> jax.Array:
    """Turn pairs of features by angles that grow with the position: `x` is [B, T, heads, F]."""
    half = x.shape[-1] // 2
    speed = 10_000.0 ** (-jnp.arange(half) / half)
    angle = (jnp.arange(x.shape[1])[:, None] * speed[None])[None, :, None]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def losses_of(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the mean cross entropy of each example, in nats per token: [B, T, V] to [B].

    The logit of the target is taken by a comparison. Indexing would be undone, in the backward
    pass, by a scatter into an array of zeros as large as the logits.
    """
    token = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    of_target = jnp.where(token == targets[..., None], logits, 0).sum(axis=-1)
    return (jax.nn.logsumexp(logits, axis=-1) - of_target).mean(axis=-1)
