"""A step of samx beside the same step written by hand: bytes, copies, and how programs grow."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import samx
from examples.cost import lean

BASE = lean.base()
# What a compiler stores is its own choice; that of jax 0.10.0 counts a copy more or less.
COUNTED = pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="another compiler")


def program(it, tx, dtype="float32"):
    """Compile the step of a transformation, or the one written by hand, from shapes."""
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), it.params)
    step = lean.by_hand(it.losses_fn) if tx is BASE else lean.with_samx(it.losses_fn, tx)
    return lean.counts(lean.compile_step(step, tx, params, it.batch), it.copy)


@COUNTED
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "it", [lean.dense([64, 256, 256, 10], 8), lean.embedding(5000, 8)], ids=["dense", "embedding"]
)
def test_sam_is_the_hand_written_step(it, dtype, monkeypatch):
    """Its memory traffic to 1%, and no copy more at the peak; readings on request cost some."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # as for those who train on one device
    hand = program(it, BASE, dtype)
    tx = optax.chain(samx.sam(0.05), BASE)
    ours, all_of_them = program(it, tx, dtype), program(it, samx.all_readings(tx), dtype)
    assert ours["bytes"] == pytest.approx(hand["bytes"], rel=0.01)
    assert ours["peak"] < hand["peak"] + 0.2
    assert all_of_them["bytes"] > 1.3 * hand["bytes"]


LAYERS = lean.dense([64] * 9 + [10], 2)
COPIES = {
    "sam": (lambda: samx.sam(0.05), 3.05),
    "gsam": (lambda: samx.gsam(0.05, 0.4), 4.2),
    "friendly_sam": (lambda: samx.friendly_sam(0.05), 4.2),
    "looksam": (lambda: samx.looksam(0.05, period=5), 5.4),
    "fisher": (lambda: samx.fisher_sparse_sam(0.05, 0.5, period=9), 5.05),
    "dynamic": (lambda: samx.dynamic_sparse_sam(0.05, 0.5, period=9), 5.3),
}


@COUNTED
@pytest.mark.parametrize(
    "name", [n if n != "dynamic" else pytest.param(n, marks=pytest.mark.slow) for n in COPIES]
)
def test_peak_in_copies_of_the_parameters(name):
    """Of eight equal layers: one leaf more or less is an eighth of a copy."""
    make, copies = COPIES[name]
    assert program(LAYERS, optax.chain(make(), BASE))["peak"] < copies


@COUNTED
def test_weighted_sam_holds_both_gradients():
    assert program(LAYERS, samx.wsam(BASE, 0.1, 0.05))["peak"] < 4.2


def equations(jaxpr):
    """Count the equations, also those inside others."""
    count = 0
    for eqn in jaxpr.eqns:
        inner = [
            x for value in eqn.params.values() for x in jax.tree.leaves(value, is_leaf=is_jaxpr)
        ]
        count += 1 + sum(equations(getattr(x, "jaxpr", x)) for x in inner if is_jaxpr(x))
    return count


def is_jaxpr(x):
    return hasattr(x, "eqns")


@functools.cache
def per_leaf(name):
    """Return the equations that one more parameter array adds to a step."""
    make = {"sam": lambda: samx.sam(0.05), "looksam": lambda: samx.looksam(0.05, period=5)}.get(
        name
    )

    def count(leaves):
        params = {f"w{i:03d}": jnp.eye(8) for i in range(leaves)}
        batch = {"image": jnp.ones((4, 8)), **lean.labels(4)}
        tx = BASE if make is None else optax.chain(make(), BASE)
        hand = lean.by_hand(lean.chain_of_layers)
        step = hand if make is None else lean.with_samx(lean.chain_of_layers, tx)
        return equations(jax.make_jaxpr(step)(params, tx.init(params), batch).jaxpr)

    return (count(30) - count(10)) / 20


@pytest.mark.parametrize(("name", "factor"), [("sam", 1.3), ("looksam", 2.4)])
def test_a_program_grows_little_faster_than_the_hand_written_one(name, factor):
    assert per_leaf(name) <= factor * per_leaf("by hand")


@pytest.mark.slow
def test_compiled_looksam_grows_with_the_number_of_leaves_only():
    """No sum over all leaves may stand in the program of each leaf."""

    def lines(leaves):
        it = lean.Problem(
            lean.chain_of_layers,
            {f"w{i:03d}": jnp.eye(8) for i in range(leaves)},
            {"image": jnp.ones((4, 8)), **lean.labels(4)},
        )
        tx = optax.chain(samx.looksam(0.05, period=5), BASE)
        step = lean.with_samx(it.losses_fn, tx)
        return len(lean.compile_step(step, tx, it.params, it.batch).as_text().splitlines())

    few, more, most = lines(10), lines(20), lines(40)
    assert most - more < 2.3 * (more - few)
