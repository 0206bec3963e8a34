"""Two image classifiers in Flax linen: ResNet-18 for 32 x 32 images, and a small ViT."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm, and a shortcut around them."""

    width: int
    strides: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):  # noqa: D102
        shortcut = x
        y = self.conv(self.width, (3, 3), self.strides)(x)
        y = nn.relu(self.norm()(y))
        y = self.norm()(self.conv(self.width, (3, 3))(y))
        if shortcut.shape != y.shape:
            shortcut = self.conv(self.width, (1, 1), self.strides)(shortcut)
            shortcut = self.norm()(shortcut)
        return nn.relu(y + shortcut)


class ResNet18(nn.Module):
    """ResNet-18 (He et al., 2016) in the usual form for CIFAR: a 3 x 3 stem without pooling.

    Attributes:
        classes: Number of logits.
        width: Channels of the first stage; 64 gives ResNet-18 with 11.2 million parameters.
        dropout: Dropout rate before the layer of the logits.
        dtype: Dtype of the computation; parameters and statistics are float32.
    """

    classes: int
    width: int = 64
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def setup(self):  # noqa: D102
        self.head = nn.Dense(self.classes, dtype=self.dtype)

    def __call__(self, x, *, train: bool):  # noqa: D102
        return self.logits(self.features(x, train=train))

    def logits(self, features: jax.Array) -> jax.Array:
        """Apply the output layer."""
        return self.head(features).astype(jnp.float32)

    @nn.compact
    def features(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Return what the output layer gets."""
        conv = partial(
            nn.Conv,
            use_bias=False,
            padding="SAME",
            dtype=self.dtype,
            kernel_init=nn.initializers.he_normal(),
        )
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        x = nn.relu(norm()(conv(self.width, (3, 3))(x)))
        for stage in range(4):
            for block in range(2):
                strides = 2 if stage > 0 and block == 0 else 1
                x = ResidualBlock(self.width * 2**stage, strides, conv, norm)(x)
        return nn.Dropout(self.dropout, deterministic=not train)(x.mean(axis=(1, 2)))


class ViT(nn.Module):
    """A small Vision Transformer (Dosovitskiy et al., 2021): 4 x 4 patches, mean pooling.

    Attributes:
        classes: Number of logits.
        width: Features of a patch, 64 per attention head; DeiT-Tiny has 192.
        depth: Number of blocks.
        dropout: Dropout rate in each residual branch.
        dtype: Dtype of the computation; parameters are float32.
    """

    classes: int
    width: int = 192
    depth: int = 6
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def setup(self):  # noqa: D102
        self.head = nn.Dense(self.classes, dtype=self.dtype)

    def __call__(self, x, *, train: bool):  # noqa: D102
        return self.logits(self.features(x, train=train))

    def logits(self, features: jax.Array) -> jax.Array:
        """Apply the output layer."""
        return self.head(features).astype(jnp.float32)

    @nn.compact
    def features(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Return what the output layer gets."""
        dense = partial(nn.Dense, dtype=self.dtype)
        norm = partial(nn.LayerNorm, dtype=self.dtype)
        dropout = partial(nn.Dropout, self.dropout, deterministic=not train)
        x = nn.Conv(self.width, (4, 4), strides=4, dtype=self.dtype)(x)
        x = x.reshape(x.shape[0], -1, self.width)
        x += self.param("position", nn.initializers.normal(0.02), x.shape[1:])[None].astype(x.dtype)
        for _ in range(self.depth):
            attention = nn.MultiHeadDotProductAttention(max(1, self.width // 64), dtype=self.dtype)
            x += dropout()(attention(norm()(x)))
            y = nn.gelu(dense(4 * self.width)(norm()(x)))
            x += dropout()(dense(self.width)(y))
        return norm()(x).mean(axis=1)


MODELS = {"resnet18": ResNet18, "vit": ViT}


def describe(params: Any) -> str:
    """Describe the size of a model."""
    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:.2f} million parameters"
