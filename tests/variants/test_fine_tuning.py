"""Functional-SAM, logits-SAM, Flat-LoRA and Bi-LoRA: settings without a recorded run, and limits.

The loops are independent; where adapters are trained, their gradients are by hand.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import reference
import reference_fine_tuning as by_hand
from identities import assert_same_updates
from recorded import MOMENTUM, SGD, assert_same

import samx
from examples.common.programs import product_flops
from samx.perturbations import magnitude, metric_ball, on_leaves

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 8
WEIGHTS = np.array([1.0] * 9 + [0.0] * 3 + [0.5, 2.0, 0.0, 1.0])
PARTS = {"features_fn": problem.features_of, "head_fn": problem.head_on}
PARTS |= {"loss_on_logits": problem.loss_on_logits}


def train(tx, params, merge_fn=None, weights=None, **closures):
    """Train on whole batches; return the parameters of every step and the last state."""
    data, _ = problem.make()
    given = {"weights": weights, "merge_fn": merge_fn, **closures}

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(params, state, params, batch=batch, **given)
        return optax.apply_updates(params, updates), state

    state, history = tx.init(params), []
    for t in range(STEPS):
        params, state = step(params, state, problem.batch_at(data, t))
        history.append(params)
    return jax.tree.map(lambda *x: np.stack(x), *history), state


# ---- Logits apart.

LOGITS = {
    "functional_sam, weights": (
        lambda: samx.functional_sam(0.3),
        lambda: by_hand.functional_sam(reference.ball(0.3)),
    ),
    "functional_sam, adaptive": (
        lambda: samx.functional_sam(perturbation=metric_ball(0.3, magnitude(0.1))),
        lambda: by_hand.functional_sam(reference.adaptive_ball(0.3, 0.1, ("W1", "W2"))),
    ),
    "logits_sam, weights": (lambda: samx.logits_sam(0.4), lambda: by_hand.logits_sam(0.4)),
    "logits_sam, by name": (
        lambda: samx.logits_sam(0.4, is_perturbed=lambda path, leaf: path[-1].key == "W2"),
        lambda: by_hand.logits_sam(0.4),
    ),
}


@pytest.mark.parametrize("name", LOGITS)
def test_logits_apart_by_hand(name):
    make, combine = LOGITS[name]
    tx = optax.chain(make(), MOMENTUM)
    found, _ = train(tx, problem.make()[1], weights=jnp.asarray(WEIGHTS), **PARTS)
    base = reference.SGD(0.1, 0.9)
    assert_same(found, by_hand.train(combine(), base, STEPS, WEIGHTS))


def test_functional_sam_of_a_linear_model_is_the_plain_gradient():
    """The derivative of its logits is the same everywhere; of a tree of logits too."""
    rng = np.random.RandomState(0)
    params = {"W": jnp.asarray(rng.randn(10, 3)), "v": jnp.asarray(rng.randn(10))}
    batch = problem.batch_at(problem.make()[0], 0)

    def apply_fn(params, batch):
        return {"z": batch["x"] @ params["W"], "scale": batch["x"] @ params["v"]}

    def loss_on_logits(logits, batch):
        return problem.loss_on_logits(logits["z"], batch) + jnp.cos(logits["scale"])

    def loss(params):
        return loss_on_logits(apply_fn(params, batch), batch).mean()

    tx = samx.functional_sam(0.7)
    closures = {"apply_fn": apply_fn, "loss_on_logits": loss_on_logits, "batch": batch}
    g, state = jax.jit(lambda p: tx.update(p, tx.init(p), p, **closures))(params)
    chex.assert_trees_all_close(g, jax.grad(loss)(params), rtol=0, atol=1e-14)
    assert state.readings.sharp_loss > state.readings.loss + 0.1


def test_logits_sam_is_sam_on_the_same_leaf():
    ball = on_leaves(metric_ball(0.3), lambda path, leaf: path[-1].key == "W2")
    pair = (lambda: samx.logits_sam(0.3), lambda: samx.sam(perturbation=ball))
    assert_same_updates({"logits_sam": pair}, steps=STEPS, layers=2)


def test_a_tied_matrix_is_perturbed_in_its_use_as_output_layer_only():
    rng = np.random.RandomState(0)
    params = {"embedding": jnp.asarray(rng.randn(7, 4)), "mix": jnp.asarray(rng.randn(4, 4))}
    batch = {"token": jnp.asarray(rng.randint(7, size=(16,))), "y": jnp.arange(16) % 7}

    def features_fn(params, batch):
        return jnp.tanh(params["embedding"][batch["token"]] @ params["mix"])

    def head_fn(params, features):
        return features @ params["embedding"].T

    def untied(params, head):
        return problem.cross_entropy(head_fn(head, features_fn(params, batch)), batch["y"]).mean()

    g = jax.grad(untied, argnums=1)(params, params)["embedding"]
    head = params | {"embedding": params["embedding"] + 0.3 * g / jnp.linalg.norm(g)}
    parts = jax.grad(untied, argnums=(0, 1))(params, head)
    expected = jax.tree.map(jnp.add, *parts)
    closures = {"features_fn": features_fn, "head_fn": head_fn, "batch": batch}
    closures["loss_on_logits"] = lambda logits, batch: problem.cross_entropy(logits, batch["y"])
    share = 28 / 44  # of the embedding
    for wrap, spent in (
        (lambda tx: tx, 1 + 2 / 3 * share),
        (lambda tx: samx.accumulate(tx, 4), 4 / 3 + 1 / 3 * share),  # features anew for each pass
    ):
        tx = wrap(samx.logits_sam(0.3))
        found, state = jax.jit(lambda p, tx=tx: tx.update(p, tx.init(p), p, **closures))(params)
        assert optax.tree.get(state, "gradients_spent") == pytest.approx(spent)
        chex.assert_trees_all_close(found, expected, rtol=0, atol=1e-13)


def flops_of_a_step(tx, width=64, classes=512):
    """Flops of a step on a network with a large output layer, and of its parts."""
    rng = np.random.RandomState(0)
    shapes = {"W1": (32, width), "b1": (width,), "W2": (width, classes), "b2": (classes,)}
    params = {k: jnp.asarray(rng.randn(*shape)) for k, shape in shapes.items()}
    batch = {"x": jnp.asarray(rng.randn(8, 32)), "y": jnp.arange(8)}

    def step(params, state, batch):
        def value_fn(params):
            return problem.losses_fn(params, batch).mean()

        g = jax.grad(value_fn)(params)
        updates, state = tx.update(g, state, params, batch=batch, **PARTS)
        return optax.apply_updates(params, updates), state

    tx = optax.with_extra_args_support(tx)
    return product_flops(jax.jit(step).lower(params, tx.init(params), batch).compile())


def test_logits_sam_takes_two_thirds_of_the_output_layers_gradient_more():
    """Counted exactly: one product of the head forwards, and one for the gradient of its matrix."""
    plain = flops_of_a_step(optax.sgd(0.1))
    head = 3 * 2 * 8 * 64 * 512  # forwards, the gradient of its matrix, that of the features
    print(f"logits-SAM: 1 gradient and {2 / 3 * head / plain:.3f}; head: {head / plain:.3f} of one")
    more = flops_of_a_step(optax.chain(samx.logits_sam(0.1), optax.sgd(0.1))) - plain
    assert more == pytest.approx(2 / 3 * head, rel=1e-12)
    both = flops_of_a_step(optax.chain(samx.functional_sam(0.1), optax.sgd(0.1)))
    assert both == pytest.approx(2 * plain, rel=1e-12)


@pytest.mark.parametrize("wrap", [jax.jit, lambda fn: jax.jit(jax.checkpoint(fn))])
def test_what_a_compiled_output_layer_reads(wrap):
    """A program inside the program may have inputs that no logit depends on."""
    tx, params = samx.logits_sam(0.3), problem.make()[1]
    closures = PARTS | {"head_fn": wrap(problem.head_on)}
    batch = problem.batch_at(problem.make()[0], 0)
    _, state = tx.update(params, tx.init(params), params, batch=batch, **closures)
    assert state.readings.gradients_spent == pytest.approx(1 + 2 / 3 * 48 / 227)


@pytest.mark.parametrize(
    ("keyword", "predicate", "fn"),
    [
        (
            "`head_fn` must read",
            None,
            lambda params, features: features[:, :3] + params["b2"][None],
        ),
        ("`is_perturbed` must choose", lambda path, leaf: False, problem.head_on),
    ],
)
def test_logits_sam_needs_something_to_perturb(keyword, predicate, fn):
    tx, params = samx.logits_sam(is_perturbed=predicate), problem.make()[1]
    batch = problem.batch_at(problem.make()[0], 0)
    with pytest.raises(ValueError, match=f"logits_sam: {keyword}.*shapes"):
        tx.update(params, tx.init(params), params, batch=batch, **PARTS | {"head_fn": fn})


# ---- Merged weights.

LIKE = {k: jax.ShapeDtypeStruct(s, np.float64) for k, s in {"W1": (10, 16), "W2": (16, 3)}.items()}


def merge_fn(adapters):
    return by_hand.merged(adapters, problem.make()[1])


def losses_of_matrices(weights, batch):
    return problem.losses_fn(problem.make()[1] | weights, batch)


def start():
    return {k: jnp.asarray(x) for k, x in by_hand.adapters().items()}


def flat_noise(key, steps):
    """The draws with this seed, from their definition: the leaves in order, of each step."""
    drawn = {}
    for i, k in enumerate(LIKE):
        keys = [
            jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(jax.random.key(key), 0), t), i)
            for t in range(steps)
        ]
        drawn[k] = np.stack([jax.random.normal(at, LIKE[k].shape, np.float64) for at in keys])
    return drawn


def first_pairs(key, rank):
    drawn = {}
    for i, (k, like) in enumerate(LIKE.items()):
        at = jax.random.fold_in(jax.random.fold_in(jax.random.key(key), 0), 0)
        shape = (like.shape[0], min(rank, *like.shape))
        drawn[k] = np.asarray(
            jax.random.normal(jax.random.fold_in(at, 2 * i), shape, np.float64)
        ) / np.sqrt(like.shape[0])
    return drawn


def rising(step):
    return jnp.array([0.0, 0.1, 0.2, 0.3, 0.3, 0.3, 0.1, 0.1])[step]


RISING = [0.0, 0.1, 0.2, 0.3, 0.3, 0.3, 0.1, 0.1]
COLUMNS = {"W1": 16, "W2": 3}
MERGED = {
    "sam": (lambda: samx.on_merged(samx.sam(0.3), LIKE), lambda: by_hand.sam_on_weights(0.3)),
    "flat_lora": (
        lambda: samx.flat_lora(0.5, num_steps=5, key=3, weights_like=LIKE),
        lambda: by_hand.flat_lora(0.5, 5, flat_noise(3, STEPS)),
    ),
    "flat_lora, schedule": (
        lambda: samx.flat_lora(rising, num_steps=1, weights_like=LIKE),
        lambda: by_hand.flat_lora(RISING, 1, flat_noise(0, STEPS)),
    ),
    "bi_lora": (
        lambda: samx.bi_lora(0.3, 2, ascent_optimizer=optax.sgd(2.0), key=3, weights_like=LIKE),
        lambda: by_hand.BiLoRA(0.3, first_pairs(3, 2), reference.SGD(2.0), COLUMNS),
    ),
    "bi_lora, adam, a radius that begins at 0": (
        lambda: samx.bi_lora(rising, ascent_optimizer=optax.adam(0.1), weights_like=LIKE),
        lambda: by_hand.BiLoRA(RISING, first_pairs(0, 8), reference.Adam(0.1), COLUMNS),
    ),
}


@pytest.mark.parametrize("name", MERGED)
def test_adapters_by_hand(name):
    make, rule = MERGED[name]
    tx = optax.chain(make(), SGD)
    found, _ = train(tx, start(), merge_fn, losses_fn=losses_of_matrices)
    assert_same(found, by_hand.train_adapters(rule(), reference.SGD(0.1), STEPS))


def test_noise_of_flat_lora_has_the_stated_deviation():
    """Per output: half a cosine of its growth times ρ times its length, over the root of in."""
    rng = np.random.RandomState(0)
    weights = {
        "stack": jnp.asarray(rng.randn(2, 3000, 5) * np.arange(1, 6)),
        "bias": jnp.ones(5),
    }
    tx = samx.flat_lora(0.2, num_steps=4, aux_like=weights)
    state = tx.init(weights)
    step = jax.jit(
        lambda s: tx.update(weights, s, weights, value_fn=lambda w: (w["bias"].sum(), w))
    )
    for factor in (0.0, 0.5 * (1 - np.sqrt(0.5)), 0.5, 0.5 * (1 + np.sqrt(0.5)), 1.0, 1.0):
        _, state = step(state)
        moved = jax.tree.map(lambda x, w: np.asarray(x - w), state.aux, weights)
        lengths = np.linalg.norm(weights["stack"], axis=1)
        expected = factor * 0.2 * lengths / np.sqrt(3000)
        np.testing.assert_allclose(moved["stack"].std(axis=1), expected, rtol=0.05, atol=1e-15)
        assert not moved["bias"].any()


def test_the_climbing_pair_is_in_the_state_alone():
    """Deployed weights are those of the adapters: without a radius they are plain LoRA's."""
    closures = {"losses_fn": losses_of_matrices}
    tx = samx.bi_lora(0.3, 2, ascent_optimizer=optax.sgd(2.0), weights_like=LIKE)
    found, (state, _) = train(optax.chain(tx, SGD), start(), merge_fn, **closures)
    assert jax.tree.map(np.shape, found) == {k: (STEPS, *x.shape) for k, x in start().items()}
    product = [pair.a @ pair.b for pair in state.pairs.values()]
    assert optax.tree.norm(product) > 0.1
    without = samx.bi_lora(0.0, 2, ascent_optimizer=optax.sgd(2.0), weights_like=LIKE)
    plain, (state, _) = train(optax.chain(without, SGD), start(), merge_fn, **closures)
    assert optax.tree.norm([pair.b for pair in state.pairs.values()]) > 0.1  # ready to climb
    lora = by_hand.train_adapters(lambda t, W, gradient: gradient(W), reference.SGD(0.1), STEPS)
    assert_same(plain, lora)
    assert np.abs(found["W1/lora_a"] - plain["W1/lora_a"]).max() > 1e-3


@pytest.mark.parametrize("rho", [0.05, 0.3])
def test_the_pairs_stay_in_their_ball(rho):
    tx = samx.all_readings(samx.bi_lora(rho, ascent_optimizer=optax.sgd(5.0), weights_like=LIKE))
    _, (state, _) = train(optax.chain(tx, SGD), start(), merge_fn, losses_fn=losses_of_matrices)
    assert optax.tree.get(state, "perturbation_norm") == pytest.approx(rho, rel=1e-12)


def test_bi_lora_needs_a_matrix():
    tx, w = samx.bi_lora(), {"bias": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"must hold a matrix \[..., in, out\], got \[\(3,\)\]"):
        tx.update(w, tx.init(w), w, value_fn=lambda w: w["bias"].sum())
