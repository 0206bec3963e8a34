"""The calls of `tests/fuzz.py`: a sample in every run, all of them in the slow one."""

import fuzz
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fuzz import Call, judge

import samx

EVERY = 59


@pytest.fixture(autouse=True)
def any_rank():
    """Wrong shapes are what is tested: no warning when JAX promotes their ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


def test_a_sample_is_refused_by_name_or_right():
    calls = [call for owner, fn in fuzz.public().items() for call in fuzz.calls_of(owner, fn)]
    calls = calls[::EVERY]
    for owner in list(fuzz.public())[::EVERY]:
        calls += list(fuzz.calls_of_one(owner))[::EVERY]
    assert not fuzz.failures(map(judge, calls))


@pytest.mark.slow
def test_every_call_is_refused_by_name_or_right():
    verdicts = [judge(call) for call in fuzz.all_calls()]
    assert len(verdicts) > 6000
    assert not fuzz.failures(verdicts)
    assert {verdict.column for verdict in verdicts} == {"clear error", "accepted and right"}


def unchecked(radius: float = 0.1):
    """A factory without any check."""

    def update_fn(g, state, params=None, **extra):
        return jax.tree.map(lambda x: radius * x, g), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update_fn)


def checked(radius: float = 0.1):
    samx.perturbations.metric_ball(radius)  # the message names `rho`
    return unchecked(radius)


def columns(factory):
    verdicts = map(judge, fuzz.calls_of("factory", factory))
    return {v.call.what: v.column for v in verdicts if v.call.fault == "a value for: number"}


def test_the_judge_finds_an_unchecked_factory():
    found = columns(unchecked)
    assert found["radius=nan"] == found["radius=True"] == "accepted and wrong"
    assert found["radius='0.1'"] == found["radius=sgd"] == "obscure error"
    assert found["radius=np.float32(0.5)"] == "accepted and right"


def test_the_judge_wants_the_name_of_the_argument():
    found = columns(checked)
    assert found["radius=nan"] == found["radius='0.1'"] == "obscure error"


def test_the_judge_wants_what_it_got():
    def refuse():
        samx.sam(-1.0)

    call = Call("sam", "", "", ("rho",), False, refuse)
    assert judge(call).column == "clear error"
    assert judge(call._replace(names=("radius",))).column == "obscure error"
    assert judge(call._replace(may_pass=True)).column == "obscure error"


def test_the_judge_knows_errors_of_the_caller():
    def update(value_fn):
        w, tx = jnp.ones(2), samx.sam()
        tx.update(w, tx.init(w), w, value_fn=value_fn)

    call = Call("sam", "", "", ("value_fn",), False, lambda: update(fuzz.raising))
    assert judge(call).column == "clear error"
    call = call._replace(run=lambda: update(lambda w: np.linalg.norm(w)))
    assert judge(call).column == "obscure error"


def test_everything_public_is_called():
    assert len(fuzz.public()) > 90
    owners = {name.rsplit(".", 1)[0] for name in fuzz.public()}
    assert {"samx", "samx.perturbations", "samx.flax", "samx.elastic", "samx.mup"} <= owners
