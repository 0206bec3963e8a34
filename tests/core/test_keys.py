"""Seeds and random keys, as arguments of factories and in states."""

import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import samx
from samx import perturbations, policies
from samx.core.hyperparams import RandomKey, check_key
from samx.perturbations import metric_ball


@pytest.mark.parametrize("key", [3, np.int64(3), np.array(3), jnp.array(3), jax.random.key(3)])
def test_a_seed_is_a_number_or_a_key(key):
    keys = RandomKey(key)
    assert keys.of(keys.data()) == jax.random.key(3)
    np.testing.assert_array_equal(keys.data(), jax.random.key_data(jax.random.key(3)))


@pytest.mark.parametrize("key", [None, True, 1.0, jnp.array(1.0), jnp.array([1, 2]), "3"])
def test_anything_else_is_refused(key):
    with pytest.raises(TypeError, match="`key` must be a seed or a key"):
        RandomKey(key)


def test_a_raw_key_is_refused_and_told_how_to_wrap():
    with pytest.raises(TypeError, match=r"for a raw key pass jax.random.wrap_key_data\(key\)"):
        RandomKey(jax.random.PRNGKey(0))


def test_a_seed_has_64_bits():
    for seed in (2**63 - 1, -(2**63)):
        RandomKey(seed).data()
    for seed in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match="`key` must be a seed of 64 bits"):
            check_key(seed)


def test_keys_are_refused():
    with pytest.raises(ValueError, match=r"`key` must be one key, got keys of shape \(2,\)"):
        check_key(jax.random.split(jax.random.key(0)))


# ---- In states.

HOLDERS = {
    "random": lambda key: policies.random(0.5, key),
    "quota": lambda key: policies.quota(4, num_blocks=2, key=key),
    "random_leaves": lambda key: perturbations.random_leaves(metric_ball(0.1), 0.5, key=key),
    "dynamic_mask": lambda key: perturbations.dynamic_mask(metric_ball(0.1), period=2, key=key),
    "dynamic_sparse_sam": lambda key: samx.dynamic_sparse_sam(0.1, period=2, key=key),
    "esam": lambda key: samx.esam(key=key),
    "ausam": lambda key: samx.ausam(num_examples=4, key=key),
    "sl_sam": lambda key: samx.sl_sam(optax.sgd(0.1), groups=1, key=key),
    "gaussian_noise": lambda key: perturbations.gaussian_noise(0.1, key=key),
    "sphere_noise": lambda key: perturbations.sphere_noise(0.1, key=key),
    "flat_lora": lambda key: samx.flat_lora(num_steps=2, key=key),
    "lpf_sgd": lambda key: samx.lpf_sgd(key=key),
    "rwp": lambda key: samx.rwp(key=key),
    "arwp": lambda key: samx.arwp(key=key),
    "marwp": lambda key: samx.marwp(key=key),
    "tsam": lambda key: samx.tsam(key=key),
    "x_sam": lambda key: samx.x_sam(key=key),
    "sassha": lambda key: samx.sassha(0.1, key=key),
    "msassha": lambda key: samx.msassha(0.1, key=key),
    "eigen_sam": lambda key: samx.eigen_sam(key=key),
    "bsam": lambda key: samx.bsam(0.1, num_examples=4, key=key),
}


def test_every_factory_with_a_key_is_here():
    rooms = (samx, policies, perturbations)
    factories = {(name, getattr(room, name)) for room in rooms for name in room.__all__}
    callables = ((name, fn) for name, fn in factories if inspect.isfunction(fn))
    taking = {name for name, fn in callables if "key" in inspect.signature(fn).parameters}
    assert taking - {"bi_lora"} == set(HOLDERS)  # bi_lora draws in `init` alone


@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.parametrize("impl", ["threefry2x32", "unsafe_rbg"])
def test_a_state_holds_ordinary_arrays(name, impl):
    key = jax.random.key(7, impl=impl)
    state = jax.eval_shape(HOLDERS[name](key).init, {"w": jnp.ones(4)})
    for leaf in jax.tree.leaves(state):
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    assert optax.tree.get(state, "key").shape == jax.random.key_data(key).shape


def decisions(policy, state, steps):
    found = []
    for _ in range(steps):
        is_sharp, state = policy.decide(None, state)
        found.append(is_sharp)
    return found, state


def by_hand(key, start, stop):
    return [jax.random.uniform(jax.random.fold_in(key, t)) < 0.5 for t in range(start, stop)]


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_draws_are_those_of_the_key_before_and_after_a_file(impl):
    key = jax.random.key(7, impl=impl)
    policy = policies.random(0.5, key)
    start = policy.init(None)
    found, state = decisions(policy, start, 4)
    assert found == by_hand(key, 0, 4)
    for restored in (
        serialization.from_bytes(start, serialization.to_bytes(state)),
        pickle.loads(pickle.dumps(jax.tree.map(np.asarray, state))),
    ):
        with jax.default_prng_impl("threefry2x32" if impl == "rbg" else "rbg"):
            found, _ = decisions(policy, restored, 4)
        assert found == by_hand(key, 4, 8)


def test_the_implementation_of_a_seed_is_the_default_of_its_time():
    with jax.default_prng_impl("rbg"):
        policy = policies.random(0.5, 7)
    found, _ = decisions(policy, policy.init(None), 4)
    assert found == by_hand(jax.random.key(7, impl="rbg"), 0, 4)


def test_a_key_may_be_mapped():
    def first(key):
        policy = policies.random(0.5, key)
        return policy.decide(None, policy.init(None))[0]

    keys = jax.random.split(jax.random.key(1), 5)
    assert jax.vmap(first)(keys).tolist() == [bool(by_hand(key, 0, 1)[0]) for key in keys]


def test_a_state_does_not_share_the_buffer_of_the_key():
    key = jax.random.key(7)
    state = policies.random(0.5, key).init(None)
    assert state.key.unsafe_buffer_pointer() != jax.random.key_data(key).unsafe_buffer_pointer()
