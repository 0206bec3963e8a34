"""What `TrainState` passes on and keeps."""

import pickle
from zlib import crc32

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import core, serialization
from flax.training import train_state

import samx
import samx.flax

pytestmark = pytest.mark.usefixtures("float64")


def small_state(tx, cls=samx.flax.TrainState, freeze=dict, **fields):
    return cls.create(apply_fn=None, params=freeze({"w": jnp.ones(2)}), tx=tx, **fields)


GRADS = {"w": np.ones(2)}


def test_contract_keywords_reach_the_optimizer_and_unknown_ones_raise():
    seen = {}
    tx = optax.GradientTransformationExtraArgs(
        lambda params: (), lambda g, state, params, **keywords: (g, seen.update(keywords) or ())
    )
    names = "value grad value_fn losses_fn batch weights ascent_fn validation_fn labels index"
    names += " training_fn"
    names += " apply_fn loss_on_logits teacher_fn"
    given = {name: i for i, name in enumerate(names.split())}
    state = small_state(tx).apply_gradients(grads=GRADS, **given, extra_args={"obj": 1})
    assert seen == given | {"obj": 1}
    assert state.tx is tx
    assert state.apply_fn is None  # that of the contract is not the state's
    with pytest.raises(TypeError, match=r"\['batch_stat'\] are neither fields of TrainState nor"):
        state.apply_gradients(grads=GRADS, batch_stat={})
    plain = small_state(optax.scale(-1.0))  # takes no keywords
    assert plain.apply_gradients(grads=GRADS, **given).params["w"].tolist() == [0.0, 0.0]


def test_extra_args_are_for_the_base():
    def scaled(g, state, params=None, *, obj_fn, **_):
        return optax.tree.scale(-obj_fn(params), g), state

    base = optax.GradientTransformationExtraArgs(lambda params: (), scaled)
    for tx in (optax.chain(samx.sam(0.0), base), samx.with_base(samx.sam(0.0), base)):
        state = small_state(tx).apply_gradients(
            grads=GRADS, value_fn=lambda p: p["w"].sum(), extra_args={"obj_fn": lambda p: 3.0}
        )
        assert state.params["w"].tolist() == [-2.0, -2.0]


def test_flax_s_own_state_is_named_when_a_closure_is_missing():
    state = train_state.TrainState.create(
        apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.chain(samx.sam(0.1), optax.sgd(0.1))
    )
    message = r"sam: `value_fn` is missing.*train_state.TrainState never.*use samx.flax.TrainState"
    with pytest.raises(ValueError, match=message):
        state.apply_gradients(grads=GRADS, value_fn=lambda p: p["w"].sum())


class Counting(samx.flax.TrainState):
    examples: int = 0


@pytest.mark.parametrize("freeze", [dict, core.freeze])
def test_a_state_goes_through_compiled_loops_and_files(freeze):
    """One program for all steps, also in `scan`; own fields; FrozenDicts; serialization."""
    tx = optax.chain(samx.sam(0.1), optax.adam(0.1))
    start = small_state(tx, Counting, freeze, key=jax.random.PRNGKey(0))

    def step(state, _=None):
        def value_fn(params):
            return jnp.sum(params["w"] ** 2)

        value, grads = jax.value_and_grad(value_fn)(state.params)
        state = state.apply_gradients(
            grads=grads, value=value, value_fn=value_fn, examples=state.examples + 4
        )
        return state, value

    start = start.replace(examples=jnp.zeros((), jnp.int32))
    assert (start.step.dtype, start.step.weak_type) == (jnp.int32, False)
    compiled, state = jax.jit(step, donate_argnums=0), jax.tree.map(jnp.copy, start)
    for _ in range(3):
        state, _ = compiled(state)
    assert compiled._cache_size() == 1
    assert (int(state.step), int(state.examples)) == (3, 12)
    assert jax.tree.structure(state) == jax.tree.structure(start)
    restored = serialization.from_bytes(start, serialization.to_bytes(state))
    pickled = pickle.loads(pickle.dumps(serialization.to_state_dict(state)))
    for same in (restored, serialization.from_state_dict(start, pickled)):
        chex.assert_trees_all_equal(same, state)
    by_scan, _ = jax.lax.scan(step, start, length=4)
    chex.assert_trees_all_close(by_scan, step(restored)[0], rtol=1e-12)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", None])
def test_draws_go_on_after_a_file(impl):
    """The state is ordinary arrays. A typed key gives the draws that it gives by hand."""
    key = jax.random.PRNGKey(3) if impl is None else jax.random.key(3, impl=impl)
    rst = samx.perturb_if(samx.policies.random(0.5, 1), samx.sam(0.1))
    start = small_state(optax.chain(rst, optax.sgd(0.1)), key=key)

    @jax.jit
    def compiled(state):
        grads = jax.tree.map(jnp.ones_like, state.params)
        state = state.apply_gradients(grads=grads, value_fn=lambda p: p["w"].sum())
        by_hand = jax.random.fold_in(jax.random.fold_in(key, state.step), crc32(b"dropout"))
        return state, [jax.random.uniform(k) for k in (state.rngs("dropout")["dropout"], by_hand)]

    def step(state):
        state, draws = compiled(state)
        np.testing.assert_array_equal(*draws)
        return state, draws[0]

    state, _ = step(start)
    restored = serialization.from_bytes(start, serialization.to_bytes(state))
    for leaf in map(np.asarray, jax.tree.leaves(restored)):
        assert leaf.dtype.kind in "fiub"
    for found, expected in zip(step(restored), step(state), strict=True):
        chex.assert_trees_all_equal(found, expected)
    np.testing.assert_array_equal(
        *(  # a typed key may come later, too
            jax.random.uniform(s.rngs("dropout")["dropout"])
            for s in (state, state.replace(key=key))
        )
    )


class Weighted(samx.flax.TrainState):
    weights: object = None
    labels: object = None


def test_a_name_that_is_a_field_and_a_keyword_does_both():
    """The loss is (batch · w)², and the second example has no weight."""
    tx = optax.chain(samx.sam(0.05), optax.sgd(0.1))
    x, weights = jnp.array([1.0, 100.0]), jnp.array([1.0, 0.0])

    def losses_fn(params, x):
        return (x * params["w"].sum()) ** 2

    def step(state, **given):
        grads = jax.grad(lambda p: (losses_fn(p, x) * weights).sum())(state.params)
        return state.apply_gradients(grads=grads, losses_fn=losses_fn, batch=x, **given)

    expected = step(small_state(tx), weights=weights)
    found = step(small_state(tx, Weighted), weights=weights, labels=jnp.arange(2))
    np.testing.assert_allclose(found.params["w"], expected.params["w"], rtol=1e-12)
    assert abs(float(found.params["w"][0])) < 10
    np.testing.assert_array_equal(found.weights, weights)
    np.testing.assert_array_equal(found.labels, [0, 1])


def test_a_keyword_in_extra_args_too():
    with pytest.raises(TypeError, match=r"\['value'\] are keywords and in `extra_args` too"):
        small_state(optax.sgd(0.1)).apply_gradients(
            grads=GRADS, value=1.0, extra_args={"value": 2.0}
        )


AROUND = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "MultiSteps as a transformation": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "MultiSteps inside": lambda tx: samx.skip_nonfinite(optax.MultiSteps(tx, 1)),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "apply_if_finite and MultiSteps": lambda tx: optax.apply_if_finite(
        samx.skip_nonfinite(optax.MultiSteps(tx, 1)), 3
    ),
}


def after_three_steps(tx):
    @jax.jit
    def step(state):
        def value_fn(params):
            return (params["w"] ** 4).sum()

        return state.apply_gradients(grads=jax.grad(value_fn)(state.params), value_fn=value_fn)

    state = small_state(tx)
    for _ in range(3):
        state = step(state)
    return state.params["w"]


SAM = optax.chain(samx.sam(0.1), optax.sgd(0.05, momentum=0.9))


@pytest.fixture(scope="module")
def unwrapped():
    with jax.enable_x64(True):
        return after_three_steps(SAM)


@pytest.mark.parametrize("name", AROUND)
def test_wrappers_of_optax_get_the_keywords(name, unwrapped):
    np.testing.assert_allclose(after_three_steps(AROUND[name](SAM)), unwrapped, rtol=1e-12)
