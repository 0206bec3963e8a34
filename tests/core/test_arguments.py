"""Every argument of every factory, by its kind: wrong values are refused by name, right ones pass.

The kind is read from the signature. A value is wrong whatever form it comes in: a Python number, a
number or an array of NumPy, an array of JAX.
"""

import inspect
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest

import samx
from samx import combinations, elastic, policies, schedules
from samx import perturbations as geometry
from samx.core.aliases import Perturbation, Radius, ScalarOrSchedule
from samx.core.hyperparams import as_list

BATCH = jax.eval_shape(lambda: problem.batch_at(problem.make("float32")[0], 0))
SGD = optax.sgd(0.1, momentum=0.9)
VARIANTS = [entry.factory for entry in samx.catalog()]
FACTORIES = {
    getattr(factory, "__name__", str(factory)): factory
    for factory in (
        *VARIANTS,
        *(getattr(geometry, name) for name in geometry.__all__),
        *(policies.every, policies.between, policies.random, policies.quota),
        *(policies.squared_norm, samx.perturb_if, samx.accumulate, samx.data_parallel),
        *(samx.skip_nonfinite, samx.scale_loss, samx.with_base, combinations.mix),
        *(combinations.surrogate_gap, combinations.renormalized, combinations.decaying),
        *(schedules.following, elastic.Rule, elastic.averaging, elastic.nesterov),
    )
}
for name in ("identity", "is_normalization", "is_not_bias", "trust_ratio", "Metric"):
    FACTORIES.pop(name, None)  # no factories
RIGHT = {  # of arguments that have no default, or none that is a number
    "base": SGD,
    "tx": SGD,
    "inner": samx.sam(),
    "perturbation": geometry.metric_ball(0.1),
    "policy": policies.every(2),
    "learning_rate": 0.1,
    "rho": 0.1,
    "rho_max": 0.1,
    "sigma": 0.1,
    "lam": 0.5,
    "num_examples": 64.0,
    "logits_like": jax.ShapeDtypeStruct((3,), np.float32),
    "end": 9,
    "steps_per_epoch": 4,
    "num_steps": 4,
    "peak_value": 0.1,
    "weight": 0.5,
    "alpha": 0.5,
    "fraction": 0.5,
    "probability": 0.5,
    "period": 3,
    "num_microbatches": 2,
    "warmup_steps": 2,
    "ramp_steps": 2,
    "stop": 9,
    "last": 2,
    "width": 2.0,
    "batch_like": BATCH,
    "class_counts": [5, 1, 2],
    "tail_classes": [1],
    "scales": dict.fromkeys(("W1", "b1", "W2", "b2"), 1.0),
    "climb": lambda g, params, rho: g,
    "is_perturbed": lambda path, leaf: True,
    "axis_name": "data",
}
SPECIAL = {  # where the name alone does not tell
    ("following", "learning_rate"): optax.cosine_decay_schedule(0.1, 10),
    ("saf", "num_examples"): 64,
    ("mup_ball", "width"): None,
    ("mup_sam", "width"): None,
}


def bad_numbers():
    return {
        "True": True,
        "np.True_": np.True_,
        "a true array": jnp.array(True),
        "a text": "0.1",
        "a list": [0.1],
        "a dict": {"a": 0.1},
        "complex": 0.1j,
        "a transformation": SGD,
        "two numbers": jnp.array([0.1, 0.2]),
        "one number in an array": np.array([0.1]),
        "a key": jax.random.key(0),
        "nan": float("nan"),
        "np.nan": np.float32("nan"),
        "an array of nan": jnp.array(jnp.nan),
    }


def out_of_range():
    return {
        "minus a lot": -1e9,
        "np.float32(-1e9)": np.float32(-1e9),
        "jnp.array(-1e9)": jnp.array(-1e9),
        "infinity": float("inf"),
        "np.inf": np.float64("inf"),
        "jnp.inf": jnp.array(jnp.inf),
        "a large int": 10**400,
    }


def forms(value):
    return {
        "np.float32": np.float32(value),
        "np.float64": np.float64(value),
        "np.array": np.array(value),
        "jnp.array": jnp.array(value),
    }


LARGE = "np.int64(-1e9)"


def bad_counts():
    return {
        "True": True,
        "np.True_": np.True_,
        "a half": 1.5,
        "3.0": 3.0,
        "a text": "3",
        "a list": [3],
        "an array": np.array([3]),
        "a traced number": jnp.array(3),
        "minus a lot": -(10**9),
        LARGE: np.int64(-(10**9)),
    }


def bad_keys():
    return {
        "True": True,
        "a half": 0.5,
        "a text": "0",
        "none": None,
        "two keys": jax.random.split(jax.random.key(0)),
        "raw": jnp.zeros(2, jnp.uint32),
        "too large": 2**70,
    }


def kind_of(factory, parameter):
    """Return what an argument is, from its annotation and its default."""
    annotation, name = parameter.annotation, parameter.name
    if annotation in (Radius, ScalarOrSchedule, ScalarOrSchedule | None):
        return "hyperparam"
    if annotation is float or annotation == (float | None):
        return "number"
    if annotation is int or annotation == (int | None) or name == "groups":
        return "count"
    if name == "key":
        return "key"
    if annotation is Perturbation or "GradientTransformation" in str(annotation):
        return "transformation"
    if "Literal" in str(annotation) and all(isinstance(x, str) for x in get_args(annotation)):
        return "choice"
    if "Policy" in str(annotation):
        return "policy"
    if "Callable" in str(annotation) or "Schedule" in str(annotation):
        return "function"
    return None


STATIC = {  # numbers that fix the program; no array of JAX
    *{("ausam", "fraction"), ("esam", "selected_fraction"), ("quota", "max_fraction")},
    *{("mup_ball", "width"), ("mup_sam", "width"), ("xsam", "alpha_max"), ("xsam", "alpha_step")},
}
FREE = {"threshold", "min_loss"}  # may be negative, the first infinite too
ARGUMENTS = [
    (name, parameter.name, kind)
    for name, factory in FACTORIES.items()
    for parameter in inspect.signature(factory).parameters.values()
    if (kind := kind_of(factory, parameter))
]


def call(name, **changes):
    """Call a factory with right arguments, but for the changes."""
    given = {}
    for key, parameter in inspect.signature(FACTORIES[name]).parameters.items():
        is_ball = parameter.annotation is Perturbation
        if parameter.default is inspect.Parameter.empty and not is_ball:
            given[key] = SPECIAL.get((name, key), RIGHT.get(key))
    if "width" in changes:
        given |= {"normalization": "layerwise"}
    return FACTORIES[name](**given | changes)


def wrong_values(name, keyword, kind):
    parameter = inspect.signature(FACTORIES[name]).parameters[keyword]
    default = parameter.default
    if parameter.annotation == ScalarOrSchedule | None:
        default = None  # `None` is right, although it is not the default
    if kind in ("hyperparam", "number"):
        bad = bad_numbers() | ({} if keyword in FREE else out_of_range())
        bad |= {"a schedule": lambda step: 0.1} if kind == "number" else {}
        bad |= {"none": None} if default is not None else {}
        return bad
    if kind == "count":
        bad = bad_counts() | ({"none": None} if default is not None else {})
        is_axis = keyword == "filter_axis"  # negative ones count from the last
        return {k: v for k, v in bad.items() if not (is_axis and k in ("minus a lot", LARGE))}
    if kind == "key":
        return bad_keys()
    bad = {"a number": 0.1, "a text": "wrong", "a list": [SGD]}
    if kind == "transformation":
        bad |= {"a factory": optax.sgd}
    if default is not None:
        bad |= {"none": None}
    return bad


@pytest.mark.parametrize(("name", "keyword", "kind"), ARGUMENTS)
def test_wrong_values_are_refused_by_name(name, keyword, kind):
    for what, value in wrong_values(name, keyword, kind).items():
        refused = ""
        try:
            call(name, **{keyword: value})
        except (TypeError, ValueError) as error:
            refused = str(error)
        assert f"`{keyword}`" in refused, f"{what}: {refused or 'accepted'}"


def right_value(name, keyword):
    default = inspect.signature(FACTORIES[name]).parameters[keyword].default
    is_given = default is not None and default is not inspect.Parameter.empty
    is_given &= not callable(default)  # a schedule
    return default if is_given else SPECIAL.get((name, keyword)) or RIGHT[keyword]


@pytest.mark.parametrize(
    ("name", "keyword", "kind"), [a for a in ARGUMENTS if a[2] in ("hyperparam", "number")]
)
def test_a_number_may_come_in_any_form(name, keyword, kind):
    value = float(right_value(name, keyword))
    for what, form in forms(value).items():
        if what != "jnp.array" or not is_static(name, keyword):
            call(name, **{keyword: form})
    if kind == "hyperparam":
        call(name, **{keyword: lambda step: value})


def is_static(name, keyword):
    return (name, keyword) in STATIC or name in ("following", "Rule")


@pytest.mark.parametrize("value", [-np.inf, np.inf, -1e9, jnp.array(-jnp.inf)])
def test_a_threshold_may_be_infinite(value):
    policies.squared_norm(value)
    samx.ae_sam(threshold=value)


@pytest.mark.parametrize(("name", "keyword"), [a[:2] for a in ARGUMENTS if a[2] == "count"])
def test_a_count_may_be_of_numpy(name, keyword):
    value = right_value(name, keyword)
    call(name, **{keyword: np.int64(value)})
    call(name, **{keyword: np.array(value)})


@pytest.mark.parametrize("name", [a[0] for a in ARGUMENTS if a[2] == "key"])
def test_a_seed_may_be_of_numpy(name):
    for key in (np.int64(3), np.uint32(3), np.array(3), jnp.array(3), 2**40, -1):
        call(name, key=key)


@pytest.mark.parametrize("form", [float, np.float32, np.array, jnp.array])
def test_a_bound_may_come_in_any_form(form):
    with pytest.raises(ValueError, match=r"`high` must be at least 0.5, got 0.1"):
        samx.ausam(low=form(0.5), high=0.1)
    samx.ausam(low=lambda step: 0.5, high=0.1)


@pytest.mark.parametrize("value", [None, "0.1", [0.1], True, 0.1j, np.array([0.1, 0.2]), SGD])
def test_a_schedule_that_returns_no_number(value):
    tx = samx.sam(lambda step: value)
    w = jnp.ones(2)
    with pytest.raises((TypeError, ValueError), match=r"`schedule\(step\)` must be (a|one) number"):
        tx.update(w, tx.init(w), w, value_fn=jnp.sum)


@pytest.mark.parametrize("value", [1, np.float32(0.1), jnp.array(0.1), np.array(0.1)])
def test_a_schedule_may_return_a_number_in_any_form(value):
    w = jnp.ones(2)
    updates, _ = samx.sam(lambda step: value).update(w, samx.sam().init(w), w, value_fn=jnp.sum)
    assert updates.tolist() == [1, 1]


@pytest.mark.parametrize("dtype", ["float31", 3, "int32", bool])
def test_a_dtype_of_the_perturbed_point(dtype):
    tx, w = samx.sam(perturb_dtype=dtype), jnp.ones(2)
    with pytest.raises((TypeError, ValueError), match="`perturb_dtype` must be"):
        tx.update(w, tx.init(w), w, value_fn=jnp.sum)


def test_most_arguments_are_here():
    assert len(ARGUMENTS) > 200
    found = {kind for *_, kind in ARGUMENTS}
    assert found == {
        *("hyperparam", "number", "count", "key", "transformation", "choice", "policy", "function")
    }


def test_a_sequence_may_be_a_vector():
    for right in ([1, 2], (1, 2), np.array([1, 2]), jnp.array([1, 2])):
        assert [int(x) for x in as_list("class_counts", right, "counts")] == [1, 2]
    for wrong in ("12", b"12", {1: 2}, 3, np.array(3), np.ones((2, 2)), jnp.ones((2, 2))):
        with pytest.raises(TypeError, match="`class_counts` must be a sequence of counts, got"):
            as_list("class_counts", wrong, "counts")
    with pytest.raises(TypeError, match="`class_counts` must be a sequence of counts, got"):
        jax.jit(lambda x: as_list("class_counts", x, "counts"))(jnp.ones(2))
