"""Draws from the posterior that bSAM learned, and averages over them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest

import samx
from samx import posterior

W = {"a": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.array(3.0)}
PRECISION = {"a": jnp.array([[1.0, 4.0, 9.0], [0.25, 16.0, 100.0]]), "b": jnp.array(2.0)}
N = 50.0


def state_of(params, precision=None, **arguments):
    state = samx.bsam(0.1, num_examples=N, **arguments).init(params)
    return state if precision is None else state._replace(precision=precision)


STATE = state_of(W, PRECISION)


@functools.cache
def drawn(count=4000):
    keys = jax.random.split(jax.random.key(5), count)
    return jax.jit(jax.vmap(lambda key: posterior.sample(STATE, W, key)))(keys)


def test_mean_and_variance():
    for k, x in drawn().items():
        deviation = 1 / np.sqrt(N * PRECISION[k])
        error = (x.mean(0) - W[k]) * np.sqrt(len(x)) / deviation
        assert np.abs(error).max() < 4, k
        np.testing.assert_allclose(x.std(0), deviation, rtol=0.05)


def test_entries_are_drawn_independently():
    x = np.concatenate([x.reshape(len(x), -1) for x in drawn().values()], 1)
    assert np.abs(np.corrcoef(x.T) - np.eye(x.shape[1])).max() < 0.07


def test_a_key_is_a_draw():
    one = posterior.sample(STATE, W, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, one, posterior.sample(STATE, W, 1))  # a seed
    for other in (posterior.sample(STATE, W, 2), posterior.sample(STATE._replace(step=1), W, 1)):
        assert all(np.all(other[k] != one[k]) for k in W)
    compiled = jax.jit(posterior.sample)(STATE, W, jax.random.key(1))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), compiled, one)


def test_inside_wrappers():
    bare = samx.bsam(0.1, num_examples=N, init_precision=2.0)
    expected = posterior.sample(bare.init(W), W, 3)
    chain = optax.chain(optax.identity(), bare)
    for tx in (
        chain,
        samx.all_readings(bare),
        samx.skip_nonfinite(chain),
        samx.all_readings(samx.skip_nonfinite(bare)),
    ):
        found = posterior.sample(tx.init(W), W, 3)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_after_some_steps():
    """The draws use the trained precision, and the number of examples that the factory got."""
    data, params = problem.make("float32")
    tx = samx.bsam(0.1, num_examples=N, num_microbatches=2, b2=0.5)
    step, state = jax.jit(problem.make_step(tx)), tx.init(params)
    for t in range(2):
        params, state = step(params, state, problem.batch_at(data, t))
    noise = optax.tree.sub(posterior.sample(state, params, 0), params)
    n = samx.core.draws.normal_like(jax.random.key(0), state.step, params)
    expected = jax.tree.map(lambda n, s: n / jnp.sqrt(N * s), n, state.precision)
    assert float(jnp.std(state.precision["W1"])) > 0
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), noise, expected)


def test_half_precision_and_integers():
    params = {"w": jnp.full(3000, 256.0, jnp.bfloat16), "table": jnp.arange(3)}
    state = state_of(params, init_precision=2.0)
    found = posterior.sample(state, params, 0)
    assert found["w"].dtype == jnp.float32
    np.testing.assert_array_equal(found["table"], params["table"])
    assert found["table"].dtype == params["table"].dtype
    np.testing.assert_allclose(found["w"].std(), 0.1, rtol=0.05)  # bfloat16 would round it away
    means = posterior.average(lambda p: p["table"].sum(), state, params, 0, draws=2)
    assert float(means) == 3


def test_complex_parameters():
    params = jnp.full(4000, 1.0 + 2.0j)
    found = posterior.sample(state_of(params, init_precision=2.0), params, 0)
    for part, mean in ((found.real, 1.0), (found.imag, 2.0)):
        np.testing.assert_allclose(part.mean(), mean, atol=0.01)
        np.testing.assert_allclose(part.std(), 0.1 / np.sqrt(2), rtol=0.05)


@pytest.mark.parametrize("draws", [1, 5])
def test_an_average_is_the_mean_over_the_draws(draws):
    def fn(params):
        return {"p": jax.nn.softmax(params["a"]), "half": params["b"].astype(jnp.bfloat16)}

    key = jax.random.key(7)
    found = jax.jit(lambda: posterior.average(fn, STATE, W, key, draws))()
    each = [fn(posterior.sample(STATE, W, jax.random.fold_in(key, i))) for i in range(draws)]
    assert found["half"].dtype == jnp.float32
    for k, x in found.items():
        mean = np.mean([np.asarray(values[k], np.float32) for values in each], 0)
        np.testing.assert_allclose(x, mean, rtol=1e-5)
    assert not jnp.allclose(found["p"], jax.nn.softmax(W["a"]), atol=1e-4)


def test_an_average_of_32_draws_by_default():
    found = posterior.average(lambda p: p["a"], STATE, W, 0)
    by_hand = posterior.average(lambda p: p["a"], STATE, W, 0, draws=32)
    np.testing.assert_array_equal(found, by_hand)


MANY = optax.chain(*2 * [samx.bsam(0.1, num_examples=N)]).init(W)
WRONG = {  # state, params, key, further arguments of `average`, the error
    "no state of bSAM": (samx.sam().init(W), W, 0, {}, "must hold one state of samx.bsam, found 0"),
    "two states of bSAM": (MANY, W, 0, {}, "must hold one state of samx.bsam, found 2"),
    "another structure": (STATE, {"a": W["a"]}, 0, {}, "`params` must have the structure"),
    "another shape": (STATE, W | {"b": jnp.ones(2)}, 0, {}, r"`params`\['b'\] must have the shape"),
    "a text": (STATE, W | {"b": "x"}, 0, {}, r"`params`\['b'\] must be an array, got a str"),
    "a number as key": (STATE, W, 0.5, {}, "`key` must be a seed or a key"),
    "no draws": (STATE, W, 0, {"draws": 0}, "`draws` must be"),
    "half a draw": (STATE, W, 0, {"draws": 0.5}, "`draws` must be"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    state, params, key, further, match = WRONG[name]
    calls = [lambda: posterior.average(lambda p: p["a"], state, params, key, **further)]
    if not further:
        calls.append(lambda: posterior.sample(state, params, key))
    for call in calls:
        with pytest.raises((TypeError, ValueError), match=match):
            call()


def test_a_function_is_required():
    with pytest.raises(TypeError, match="`fn` must be a function"):
        posterior.average(0.5, STATE, W, 0)
    with pytest.raises(TypeError, match=r"`fn\(params\)` must be an array, got a str"):
        posterior.average(lambda p: "x", STATE, W, 0)
