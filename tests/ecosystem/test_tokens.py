"""A language model: the mean over tokens is the mean over sequences, weighted by their tokens.

By hand: the sum of the losses of all tokens, divided by their number.
"""

import hand
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from regimes import mesh_of

import samx

pytestmark = pytest.mark.usefixtures("float64")

RHO, LENGTHS = 0.3, np.array([6, 1, 2, 1])
ALPHABET, WIDTH = 5, 3
SGD = optax.sgd(0.1, momentum=0.9)


def batches():
    """Return two batches of padded sequences; both have 4 sequences of different lengths."""
    rng = np.random.RandomState(0)
    return [
        {
            "tokens": rng.randint(ALPHABET, size=(4, 7)),
            "is_token": np.arange(6) < np.roll(LENGTHS, t)[:, None],
        }
        for t in range(2)
    ]


def start():
    rng = np.random.RandomState(1)
    params = {"in": rng.randn(ALPHABET, WIDTH), "out": rng.randn(WIDTH, ALPHABET)}
    return jax.tree.map(jnp.asarray, params)


def token_losses(w, batch):
    """Return the loss of predicting each next token, [B, T]."""
    logits = jnp.tanh(w["in"][batch["tokens"][:, :-1]]) @ w["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])


def token_mean(w, batch):
    return (token_losses(w, batch) * batch["is_token"]).sum() / batch["is_token"].sum()


def losses_fn(w, batch):
    """Return the mean loss of each sequence, [B]."""
    return (token_losses(w, batch) * batch["is_token"]).sum(1) / batch["is_token"].sum(1)


# ---- By hand.


@jax.jit
def grad(w, batch):
    return jax.grad(token_mean)(w, batch)


def together(w, batch):
    return hand.sam_gradient(lambda w: grad(w, batch), w, RHO)


def apart(*indices):
    """Climb the tokens of some sequences, then those of others; each token counts once."""

    def gradient(w, batch):
        total = jax.tree.map(jnp.zeros_like, w)
        for index in indices:
            piece = jax.tree.map(lambda x, index=index: x[index], batch)
            share = piece["is_token"].sum() / batch["is_token"].sum()
            total = hand.add(total, together(w, piece), share)
        return total

    return gradient


def by_hand(gradient):
    w, buffer = start(), jax.tree.map(jnp.zeros_like, start())
    for batch in batches():
        buffer = hand.add(gradient(w, batch), buffer, 0.9)
        w = hand.add(w, buffer, -0.1)
        yield w


# ---- With samx.


def step_of(tx, *, weighted=True, keyword="losses_fn"):
    def step(w, state, batch):
        loss = token_mean if weighted else lambda w, batch: losses_fn(w, batch).mean()
        closures = {"losses_fn": losses_fn, "batch": batch}
        if keyword == "value_fn":
            closures = {"value_fn": lambda w: token_mean(w, batch)}
        if weighted:
            closures["weights"] = batch["is_token"].sum(1)
        g = jax.grad(loss)(w, batch)
        updates, state = tx.update(g, state, w, **closures)
        return optax.apply_updates(w, updates), state

    return step


def train(step, tx):
    step, w, state = jax.jit(step), start(), tx.init(start())
    for batch in batches():
        w, state = step(w, state, batch)
        yield w


def on_two_devices(tx, ascent="global", **how):
    tx = samx.data_parallel(tx, "data", ascent)
    step = jax.shard_map(
        step_of(tx, **how), mesh=mesh_of((2,)), in_specs=(P(), P(), P("data")), out_specs=P()
    )
    return train(step, tx)


def on_one_device(tx, **how):
    return train(step_of(tx, **how), tx)


SAM, MSAM = (optax.chain(variant, SGD) for variant in (samx.sam(RHO), samx.msam(RHO, 2)))
STRIDED, HALVES = apart(np.r_[0, 2], np.r_[1, 3]), apart(np.r_[0, 1], np.r_[2, 3])
STEPS = {
    "sam": (on_one_device, SAM, {}, together),
    "msam": (on_one_device, MSAM, {}, STRIDED),
    "accumulate": (on_one_device, samx.accumulate(SAM, 2), {}, together),
    "data_parallel": (on_two_devices, SAM, {}, together),
    "data_parallel, value_fn": (on_two_devices, SAM, {"keyword": "value_fn"}, together),
    "data_parallel, climbing apart": (on_two_devices, SAM, {"ascent": "local"}, HALVES),
    "msam on two devices": (on_two_devices, MSAM, {}, STRIDED),
}


@pytest.mark.parametrize("name", STEPS)
def test_weights_count_the_tokens(name):
    run, tx, how, gradient = STEPS[name]
    hand.assert_same(run(tx, **how), by_hand(gradient))


def test_without_weights_each_sequence_counts_the_same():
    def gradient(w, batch):
        sequence_mean = jax.jit(lambda w: losses_fn(w, batch).mean())
        return hand.sam_gradient(jax.grad(sequence_mean), w, RHO)

    found = [*on_one_device(SAM, weighted=False)]
    hand.assert_same(found, by_hand(gradient))
    by_tokens = [*by_hand(together)]
    assert np.abs(found[0]["in"] - by_tokens[0]["in"]).max() > 1e-3
