"""µP: the scales of Flax's layers, and what they achieve."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from flax import nnx

import samx
import samx.flax
from samx.mup import flax_fans, layer_scales, learning_rates


class Everything(nn.Module):
    """One layer of each kind, `r` times as wide as its base."""

    r: int

    @nn.compact
    def __call__(self, tokens, image):
        n, r = 8 * self.r, self.r
        x = nn.Embed(11, n, name="embed")(tokens)
        x += self.param("position", nn.initializers.zeros, (1, 4, n))
        x = nn.LayerNorm(name="norm")(x)
        x = nn.MultiHeadDotProductAttention(2 * r, qkv_features=n, name="attention")(x)
        x = nn.Dense(4 * n, name="up")(x)
        y = nn.Conv(n, (3, 3), name="stem")(image)
        y = nn.Conv(2 * n, (3, 3), name="conv")(y)
        y = nn.Conv(2 * n, (3, 3), feature_group_count=2 * n, name="depthwise")(y)
        temperature = self.param("temperature", nn.initializers.ones, ())
        x = jnp.concatenate([x.mean(axis=1), y.mean(axis=(1, 2))], axis=-1)
        return nn.Dense(10, name="head")(x) * temperature


def shapes(r):
    arguments = jnp.zeros((2, 4), int), jnp.zeros((2, 8, 8, 3))
    return jax.eval_shape(Everything(r).init, jax.random.key(0), *arguments)["params"]


# For each path in a network 4 times as wide: the scale, and Adam's learning rate.
EXPECTED = {
    "embed/embedding": (4, 1),
    "position": (4, 1),
    "norm/scale": (4, 1),
    "norm/bias": (4, 1),
    "attention/query/kernel": (1, 1 / 4),
    "attention/query/bias": (4, 1),
    "attention/key/kernel": (1, 1 / 4),
    "attention/key/bias": (4, 1),
    "attention/value/kernel": (1, 1 / 4),
    "attention/value/bias": (4, 1),
    "attention/out/kernel": (1, 1 / 4),
    "attention/out/bias": (4, 1),
    "up/kernel": (1, 1 / 4),
    "up/bias": (4, 1),
    "stem/kernel": (4, 1),
    "stem/bias": (4, 1),
    "conv/kernel": (1, 1 / 4),
    "conv/bias": (4, 1),
    "depthwise/kernel": (4, 1),
    "depthwise/bias": (4, 1),
    "temperature": (1, 1),
    "head/kernel": (1 / 4, 1 / 4),
    "head/bias": (1, 1),
}


def by_path(tree):
    return {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_scales_of_every_linen_layer():
    wide, base = shapes(4), shapes(1)
    found = by_path(layer_scales(wide, base))
    adam = by_path(learning_rates(wide, base, "adam"))
    assert {path: (s, adam[path]) for path, s in found.items()} == EXPECTED
    assert learning_rates(wide, base) == layer_scales(wide, base)
    assert set(jax.tree.leaves(layer_scales(wide, wide))) == {1.0}


def test_more_heads_and_wider_heads_are_both_width():
    def attention(heads, features):
        net = nn.MultiHeadDotProductAttention(heads, qkv_features=features, out_features=8)
        return jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 2, 8)))["params"]

    for wide in (attention(4, 16), attention(2, 16)):
        found = by_path(layer_scales(wide, attention(2, 8)))
        assert (found["query/kernel"], found["query/bias"]) == (2, 2)
        assert (found["out/kernel"], found["out/bias"]) == (1 / 2, 1)


class Net(nnx.Module):
    def __init__(self, n, rngs):
        self.embed = nnx.Embed(11, n, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, n, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(n, rngs=rngs)
        self.head = nnx.Linear(n, 10, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.norm(self.attention(self.embed(tokens))).mean(axis=1))


def test_nnx_layers():
    def params(n):
        return nnx.state(nnx.eval_shape(lambda: Net(n, nnx.Rngs(0))), nnx.Param)

    scales = nnx.to_pure_dict(layer_scales(params(16), params(4)))
    assert scales["embed"]["embedding"] == scales["norm"]["scale"] == 4
    assert scales["attention"]["query"]["kernel"] == scales["attention"]["out"]["kernel"] == 1
    assert scales["head"] == {"kernel": 1 / 4, "bias": 1}


@nnx.jit
def wide_net():
    return Net(16, nnx.Rngs(0))


@pytest.mark.parametrize("of", [nnx.as_pure, lambda state: state, nnx.to_pure_dict])
def test_scales_in_any_container(of):
    """`nnx.Optimizer` passes parameters on without their variables."""
    model = wide_net()
    base = nnx.state(nnx.eval_shape(lambda: Net(4, nnx.Rngs(0))), nnx.Param)
    scales = layer_scales(of(nnx.state(model, nnx.Param)), of(base))
    optimizer = nnx.Optimizer(
        model, optax.chain(samx.mup_sam(0.05, scales), optax.sgd(0.1)), wrt=nnx.Param
    )

    def loss(model):
        logits = model(jnp.arange(8).reshape(2, 4))
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(2)).mean()

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads, value=value, value_fn=samx.flax.closure(model, loss))
        return value

    first, second = step(model, optimizer), step(model, optimizer)
    assert second < first


def test_rules_of_ones_own_by_path():
    def fans(path, shape):
        return (shape[-1], 1) if path[0].key == "position" else flax_fans(path, shape)

    found = by_path(layer_scales(shapes(4), shapes(1), fans=fans))
    expected = {path: s for path, (s, _) in EXPECTED.items()} | {"position": 1 / 4}
    assert found == expected
    assert by_path(learning_rates(shapes(4), shapes(1), "adam", fans=fans))["position"] == 1 / 4


BAD_BASES = {
    "lacks a layer": (
        lambda tree: {k: v for k, v in tree.items() if k != "head"},
        r"`base_params` must have the leaves of `params`.*lacks .*head.*kernel",
    ),
    "has one more": (lambda tree: tree | {"tail": tree["temperature"]}, r"has .*tail.* not there"),
    "other axes": (
        lambda tree: tree | {"temperature": tree["position"]},
        r"`base_params`\['temperature'\] must have as many axes as `params`.*\(1, 4, 8\) and \(\)",
    ),
    "an empty layer": (
        lambda tree: tree | {"position": jax.ShapeDtypeStruct((1, 4, 0), jnp.float32)},
        r"none of length 0, got shapes \(1, 4, 0\)",
    ),
}


@pytest.mark.parametrize("name", BAD_BASES)
@pytest.mark.parametrize("function", [layer_scales, learning_rates])
def test_trees_that_do_not_match(name, function):
    change, message = BAD_BASES[name]
    with pytest.raises(ValueError, match=f"{function.__name__}: .*{message}"):
        function(shapes(2), change(shapes(1)))


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="must be 'sgd' or 'adam', got 'lion'"):
        learning_rates(shapes(1), shapes(1), "lion")


SCALES = {"W1": 5.0, "b1": 5.0, "W2": 0.2, "b2": 1.0}


def test_it_is_sam_where_the_forward_pass_carries_the_width(float64):
    """With w = √s v, plain SAM with one learning rate for v is µP² for w."""
    roots, base = {k: s**0.5 for k, s in SCALES.items()}, optax.sgd(0.1, momentum=0.9)
    data, params = problem.make()

    def rescaled(v, batch):
        return problem.losses_fn({k: roots[k] * v[k] for k in v}, batch)

    def start():
        return data, {k: w / roots[k] for k, w in params.items()}

    expected = problem.train(optax.chain(samx.sam(0.3), base), 12, start, rescaled)
    tx = optax.chain(
        samx.mup_sam(0.3, SCALES),
        base,
        optax.stateless(lambda u, _: jax.tree.map(jnp.multiply, u, SCALES)),
    )
    found = problem.train(tx, 12)
    for name, root in roots.items():
        np.testing.assert_allclose(found[name], root * expected[name], rtol=0, atol=1e-10)


def test_the_effect_on_the_features_does_not_depend_on_the_width(float64):
    """One exact step of one linear layer of each kind has the same effect for r = 1 and r = 9."""
    rng = np.random.default_rng(0)
    x, signs = rng.normal(size=5), rng.choice([-1.0, 1.0], size=4)

    def effect(r, scaled):
        w = {"in": jnp.tile(signs[:, None], (r, 5)), "head": jnp.tile(signs[None], (1, r)) / r}
        base = {"in": jnp.zeros((4, 5)), "head": jnp.zeros((1, 4))}

        def fans(path, shape):  # [out, in], unlike Flax
            return shape[::-1]

        s = layer_scales(w, base, fans=fans) if scaled else {"in": 1.0, "head": 1.0}

        def hidden(w):
            return w["in"] @ x

        @jax.jit
        def changes(w):
            g = jax.grad(lambda w: (w["head"] @ hidden(w))[0])(w)
            eps, _ = (ball := samx.perturbations.mup_ball(0.1, s)).update(g, ball.init(w), w)
            moved = jax.tree.map(jnp.add, w, eps)
            return (
                jnp.abs(hidden(moved) - hidden(w)).mean(),
                jnp.abs((moved["head"] - w["head"]) @ hidden(w))[0],
            )

        return changes(w)

    np.testing.assert_allclose(effect(9, True), effect(1, True), rtol=1e-9)
    plain = np.array(effect(9, False)) / np.array(effect(1, False))
    assert plain[0] < 0.2
    assert plain[1] > 2
