"""Weights seen through a map: what `merge_fn` means for every optimizer, and inside `on_merged`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import reference_fine_tuning as by_hand
from chex import assert_trees_all_close
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import samx

pytestmark = pytest.mark.usefixtures("float64")

with jax.enable_x64(True):
    DATA, FROZEN = problem.make()
    ADAPTERS = {k: jnp.asarray(x) for k, x in by_hand.adapters().items()}
    BATCH = problem.batch_at(DATA, 0)


def merge_fn(adapters):
    return by_hand.merged(adapters, FROZEN)


with jax.enable_x64(True):
    LIKE = jax.eval_shape(merge_fn, ADAPTERS)


def losses_fn(weights, batch):
    return problem.losses_fn(FROZEN | weights, batch)


def gradient(adapters, batch=BATCH):
    return jax.grad(lambda a: losses_fn(merge_fn(a), batch).mean())(adapters)


def update(tx, adapters=ADAPTERS, batch=BATCH, **changes):
    """Return the result of the first update; `grads` are those of the adapters."""
    closures = {"losses_fn": losses_fn, "batch": batch, "merge_fn": merge_fn} | changes
    return jax.jit(lambda a: tx.update(gradient(a, batch), tx.init(a), a, **closures)[0])(adapters)


def sam_on_weights(adapters, batch, rho=0.3):
    """SAM on the weights by hand, pulled back to the adapters."""

    def loss(weights):
        return losses_fn(weights, batch).mean()

    weights, pull = jax.vjp(merge_fn, adapters)
    g = jax.grad(loss)(weights)
    scale = rho / optax.tree.norm(g)
    return pull(jax.grad(loss)(jax.tree.map(lambda w, x: w + scale * x, weights, g)))[0]


def assert_close(a, b, atol=1e-13):
    assert_trees_all_close(a, b, rtol=0, atol=atol)


def test_without_on_merged_sam_climbs_the_adapters():
    g = gradient(ADAPTERS)
    scale = 0.3 / optax.tree.norm(g)
    expected = gradient(jax.tree.map(lambda w, x: w + scale * x, ADAPTERS, g))
    assert_close(update(samx.sam(0.3)), expected)
    by_value = {"value_fn": lambda weights: losses_fn(weights, BATCH).mean()}
    assert_close(update(samx.sam(0.3), losses_fn=None, **by_value), expected)
    assert np.abs(expected["W1/lora_a"] - sam_on_weights(ADAPTERS, BATCH)["W1/lora_a"]).max() > 1e-3


AROUND = {
    "alone": lambda tx: tx,
    "accumulate": lambda tx: samx.accumulate(tx, 4),
    "skip_nonfinite": samx.skip_nonfinite,
}


@pytest.mark.parametrize("around", AROUND)
def test_sam_on_the_weights(around):
    tx = AROUND[around](samx.on_merged(samx.sam(0.3), LIKE))
    assert_close(update(tx), sam_on_weights(ADAPTERS, BATCH))


def test_an_inner_step_that_is_skipped_is_the_plain_gradient():
    policy = samx.policies.between(1)
    tx = samx.on_merged(samx.perturb_if(policy, samx.sam(0.3)), LIKE)
    assert_close(update(tx), gradient(ADAPTERS))
    with pytest.raises(ValueError, match=r"on_merged\(perturb_if\(policy, inner\)\)"):
        update(samx.perturb_if(policy, samx.on_merged(samx.sam(0.3), LIKE)))


def test_frozen_adapters_are_not_moved():
    mask = {k: k.startswith("W1") for k in ADAPTERS}
    base = optax.chain(samx.on_merged(samx.sam(0.3), LIKE), optax.sgd(0.1))
    found, expected = update(samx.freeze(base, mask)), sam_on_weights(ADAPTERS, BATCH)
    for k, x in found.items():
        np.testing.assert_allclose(x, 0 if mask[k] else -0.1 * expected[k], atol=1e-14)


def test_line_searches_get_the_loss_of_the_adapters():
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)
    base = optax.chain(optax.sgd(1.0), search)
    tx = samx.with_base(samx.on_merged(samx.sam(0.01), LIKE), base)
    value, g = losses_fn(merge_fn(ADAPTERS), BATCH).mean(), gradient(ADAPTERS)
    moved = optax.apply_updates(ADAPTERS, update(tx, value=value, grad=g))
    assert losses_fn(merge_fn(moved), BATCH).mean() < value


@pytest.mark.parametrize(("ascent", "check_vma"), [("global", True), ("local", False)])
def test_on_devices(ascent, check_vma):
    """The mean of the devices' own ascents, or one ascent of all."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    tx = samx.data_parallel(samx.on_merged(samx.sam(0.3), LIKE), "d", ascent=ascent)

    def of_device(adapters, batch):
        return update(tx, adapters, batch)

    specs = {"in_specs": (P(), P("d")), "out_specs": P()}
    step = jax.shard_map(of_device, mesh=mesh, check_vma=check_vma, **specs)
    parts = [BATCH]
    if ascent == "local":
        parts = [jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], BATCH) for i in range(4)]
    expected = [sam_on_weights(ADAPTERS, part) for part in parts]
    assert_close(step(ADAPTERS, BATCH), jax.tree.map(lambda *x: sum(x) / len(x), *expected))


# Variants that need other closures than a scalar loss, and see them in the space of the weights.
INNER = {
    "msam": lambda: samx.msam(0.3, 4),
    "mesa": lambda: samx.mesa(steps_per_epoch=1, start=5),
    "functional_sam": lambda: samx.functional_sam(0.0),
    "logits_sam": lambda: samx.logits_sam(0.0),
}


@pytest.mark.parametrize("name", INNER)
def test_all_closures_take_weights(name):
    def logits_of(weights, batch):
        return problem.logits_of(FROZEN | weights, batch)

    closures = {
        "features_fn": lambda weights, batch: problem.features_of(FROZEN | weights, batch),
        "head_fn": lambda weights, features: problem.head_on(FROZEN | weights, features),
        "loss_on_logits": problem.loss_on_logits,
        "teacher_fn": logits_of,
    }
    found = update(samx.on_merged(INNER[name](), LIKE), losses_fn=None, **closures)
    if name == "msam":
        assert all(np.isfinite(x).all() for x in found.values())
    else:
        assert_close(found, gradient(ADAPTERS))


def test_complex_adapters_and_integers():
    """The gradient of the caller's convention: it points uphill at complex leaves."""
    adapters = {"a": jnp.asarray([1.0 + 2.0j, 3.0 - 1.0j]), "n": jnp.arange(2)}

    def merge_fn(adapters):
        return {"w": adapters["a"] ** 2, "n": adapters["n"]}

    def value_fn(weights):
        return (jnp.abs(weights["w"] - 1.0) ** 2).sum()

    g = jax.grad(lambda a: value_fn(merge_fn(adapters | {"a": a})))(adapters["a"])
    grads = {"a": jnp.conj(g), "n": jnp.zeros(2, int)}
    tx = samx.on_merged(samx.sam(0.0), jax.eval_shape(merge_fn, adapters))
    closures = {"value_fn": value_fn, "merge_fn": merge_fn}
    found, _ = tx.update(grads, tx.init(adapters), adapters, **closures)
    np.testing.assert_allclose(found["a"], grads["a"], rtol=1e-14)
    assert not found["n"].any()


def test_what_is_refused():
    for base in (samx.momentum_sam(optax.sgd(0.1, momentum=0.9)), samx.lightsam_adam(0.1)):
        with pytest.raises(ValueError, match="on_merged: `inner` must stand in front of a base"):
            samx.on_merged(base).init(ADAPTERS)
    with pytest.raises(TypeError, match="on_merged: `inner` must be an optax transformation"):
        samx.on_merged(merge_fn)
    with pytest.raises(TypeError, match="`weights_like`"):
        samx.on_merged(samx.sam(), {"w": "a text"}).init(ADAPTERS)
    with pytest.raises(TypeError, match="on_merged: `merge_fn` must be a function, got dict"):
        update(samx.on_merged(samx.sam(), LIKE), merge_fn={})


def test_bases_and_optimizers_are_found_in_chains_too():
    wrapped = samx.momentum_sam(optax.sgd(0.1, momentum=0.9))
    for inner in (optax.chain(wrapped), optax.chain(optax.identity(), samx.lightsam_adam(0.1))):
        with pytest.raises(ValueError, match="on_merged: `inner` must stand in front of a base"):
            samx.on_merged(inner).init(ADAPTERS)
        with pytest.raises(ValueError, match="perturb_if: `inner` must stand in front of a base"):
            samx.perturb_if(samx.policies.every(2), inner).init(ADAPTERS)


def test_errors_name_the_map():
    of_parameters = {"losses_fn": None, "value_fn": lambda a: losses_fn(merge_fn(a), BATCH).mean()}
    for tx in (samx.sam(0.1), samx.on_merged(samx.sam(0.1), LIKE)):
        with pytest.raises(KeyError) as caught:
            update(tx, **of_parameters)
        assert "closures take what `merge_fn(params)` returns" in "".join(caught.value.__notes__)
    for tx in (samx.on_merged(samx.sam(0.1)), samx.bi_lora(0.1)):
        with pytest.raises(ValueError, match=r"Pass weights_like=jax\.eval_shape"):
            update(tx)
    with pytest.raises(ValueError, match=r"W1.*must have the shape of `weights_like`, \(3,\)"):
        update(samx.flat_lora(num_steps=2, weights_like=LIKE | {"W1": jnp.ones(3)}))
    with pytest.raises(ValueError, match="`merge_fn` is missing, and `weights_like` was given"):
        update(samx.on_merged(samx.sam(0.1), LIKE), merge_fn=None)


def test_nothing_of_the_weights_is_in_the_state():
    state = samx.on_merged(samx.sam(0.1), LIKE).init(ADAPTERS)
    assert all(x.size == 1 for x in jax.tree.leaves(state))
