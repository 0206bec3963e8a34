"""What is a right value for an argument: one rule for each kind of argument.

A kind is read from the annotation of a parameter, or from its name where the annotation says
nothing. `is_right` tells of any value whether the kind has to accept it (True), has to refuse it
(False), or may do either (None), such as a number that may lie outside of the range.
"""

import dataclasses
import inspect
import operator
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import cache
from typing import Any, Literal, NamedTuple, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec

import samx
from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule
from samx.elastic import Checkpoint, Event, Rule, Threads, Worker

SIZE = 4  # examples in a batch
PARAMS = {"norm": jnp.array([0.5, -1.0]), "head": jnp.eye(2), "b": jnp.array(0.25)}
BATCH = {"x": jnp.arange(8.0).reshape(SIZE, 2) / 8, "y": jnp.arange(SIZE) % 3}
SGD = optax.sgd(0.1, momentum=0.9)
CPU = jax.devices()[0]
SPECS = PartitionSpec()
LARGE = 1e6  # no number of a hyperparameter is larger


def losses(params, batch):
    return (batch["x"] @ params["norm"] + params["b"] - batch["y"]) ** 2


def loss(params):
    return losses(params, BATCH).mean()


def logits_of(params, batch):
    return head_on(params, features_of(params, batch))


def features_of(params, batch):
    return batch["x"] * params["norm"]


def head_on(params, features):
    return (features @ params["head"]).sum(axis=1, keepdims=True) + params["b"]


def loss_on_logits(logits, batch):
    return (logits[:, 0] - batch["y"]) ** 2


OBJECTIVE = samx.sharpness.objective(apply_fn=logits_of, loss_on_logits=loss_on_logits, batch=BATCH)


def gradient(params, batch):
    return jax.grad(lambda p: losses(p, batch).mean())(params)


MODEL = nnx.Linear(2, 1, rngs=nnx.Rngs(0))


def worker(index=0):
    def step(params, opt_state, batch):
        return jax.tree.map(lambda w: 0.9 * w, params), opt_state, jnp.ones(())

    return Worker(PARAMS, lambda params: (), step, lambda start: iter([BATCH] * 20))


def update_fn(g, state, params, *, value_fn):
    return g, state


def whole_step():
    tx = samx.sam()
    return tx.update(gradient(PARAMS, BATCH), tx.init(PARAMS), PARAMS, value_fn=loss)


# Right values by name, for arguments without a default; by `callable.name` where names differ.
GOOD = {
    **dict.fromkeys(("params", "base_params", "eps", "center", "move", "tree"), PARAMS),
    **dict.fromkeys(("batch", "batch_like"), BATCH),
    **dict.fromkeys(("base", "tx"), SGD),
    **dict.fromkeys(("rho", "rho_max", "learning_rate", "peak_value"), 0.1),
    **dict.fromkeys(("weight", "fraction", "probability", "alpha"), 0.5),
    **dict.fromkeys(("period", "num_microbatches", "num_selected", "num_workers"), 2),
    **dict.fromkeys(("descent_device", "ascent_device"), CPU),
    **dict.fromkeys(("w_norm", "g_norm", "total"), jnp.array(0.5)),
    "inner": samx.sam(),
    "step": whole_step,
    "mask": {"norm": False, "b": True},
    "perturbation": samx.perturbations.metric_ball(0.1),
    "policy": samx.policies.every(2),
    "class_counts": [5, 1, 2],
    "tail_classes": [1],
    "scales": dict.fromkeys(PARAMS, 1.0),
    "climb": lambda g, params, rho: g,
    "is_perturbed": lambda path, leaf: True,
    "is_stacked": lambda path, leaf: jnp.ndim(leaf) == 2,
    "axis_name": "data",
    "init_fn": lambda params: (),
    "update_fn": update_fn,
    "value_fn": loss,
    "losses_fn": losses,
    "logits": jnp.arange(6.0).reshape(2, 3),
    "labels": jnp.array([0, 2]),
    "scores": jnp.arange(4.0),
    "probabilities": jnp.full(4, 0.25),
    "noise": jnp.arange(4.0),
    "position": jnp.array([[0, 2]], jnp.int32),
    "values": jnp.ones(2),
    "size": 4,
    "path": (jax.tree_util.DictKey("kernel"),),
    "leaf": jnp.ones((2, 3)),
    "shape": (2, 3),
    "all_readings.tx": samx.sam(),
    "ksam.num_selected": 2,
    "following.learning_rate": optax.cosine_decay_schedule(0.1, 10),
    "axis_mean.tree": PARAMS,
    "take.tree": BATCH,
    "fast_convolutions.fn": jnp.sin,
    "num_exchanges": 3,
    "seconds_per_step": [1.0, 2.0],
    "order": [0, 1, 0],
    "make_worker": worker,
    "rule": Rule(period=1),
    "workers": [worker()],
    "descend": lambda params, opt_state, batch, ascent_grad: (params, opt_state, 0.0),
    "ascend": gradient,
    "grad_fn": gradient,
    "opt_state": samx.async_sam().init(PARAMS),
    "batches": [(BATCH, BATCH)],
    "model": MODEL,
    "optimizer": nnx.Optimizer(MODEL, SGD, wrt=nnx.Param),
    "fn": lambda model: model(BATCH["x"]).mean(),
    **dict.fromkeys(("direction", "g", "a", "b"), PARAMS),
    **dict.fromkeys(("grid", "alphas", "betas"), jnp.array([-1.0, 0.0, 1.0])),
    **dict.fromkeys(("sigma", "radius"), 0.25),
    **dict.fromkeys(("shard_size", "every"), 3),
    "f": OBJECTIVE,
    "vectors": jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS),
    "directions": (PARAMS, jax.tree.map(jnp.cos, PARAMS)),
    "is_chosen": lambda path, leaf: jnp.ndim(leaf) == 2,
    "measures": {"loss": lambda f, params: f(params)},
    "relative_flatness.params": {"norm": jnp.eye(2), "b": jnp.ones(2)},
    "relative_flatness.f": lambda params: jnp.sum(params["norm"] ** 3) + params["b"].sum(),
    "eigenvalues.k": 2,
    "objective.losses_fn": losses,
    "objective.batch": BATCH,
    "lam": 0.5,
    "num_examples": 64.0,
    "one_minus_inverse.step": 3,
    "schedule": optax.cosine_decay_schedule(0.1, 10),
    "start_of_decay.num_steps": 10,
    **{"policies": [samx.policies.every(2), samx.policies.every(1)], "boundaries": [4]},
    "bsam.num_microbatches": 2,
    **{"saf.num_examples": 64, "logits_like": jax.ShapeDtypeStruct((1,), np.float32)},
    **{"steps_per_epoch": 4, "teacher": jnp.ones((2, 3))},
    **dict.fromkeys(("sample.key", "average.key"), 0),
    **{"warmup": 2.0, "decay_from": 3.0, "end": 5.0},
    **dict.fromkeys(("sample.opt_state", "average.opt_state"), samx.bsam(0.1, 64.0).init(PARAMS)),
    "average.fn": lambda params: params["norm"] + params["b"],
    "swa.start": 2,
    "num_steps": 4,
    "merge_fn": lambda params: params,
    "num_iterates": 2,
    "validation_loss": 0.5,
    "params.opt_state": samx.averages.ema(SGD).init(PARAMS),
    "end_segment.opt_state": samx.averages.swad(SGD).init(PARAMS),
    "batch_stats.fn": lambda params, stats, batch: {
        "mean": 0.9 * stats["mean"] + batch["x"].mean()
    },
    "batch_stats.batch_stats": {"mean": jnp.ones(2)},
    "batch_stats.batches": [BATCH, BATCH],
}

SEQUENCES = {  # of what: a test of the elements, of the whole
    "class_counts": (lambda x: is_real(x) and 0 < x < np.inf, lambda xs: len(xs) > 0),
    "tail_classes": (lambda x: is_whole(x) and x >= 0, lambda xs: True),
    "seconds_per_step": (lambda x: is_real(x) and 0 < x < np.inf, lambda xs: len(xs) > 0),
    "order": (lambda x: is_whole(x) and x >= 0, lambda xs: True),
    "changes": (lambda x: isinstance(x, tuple) and len(x) == 3, lambda xs: True),
    "drops": (lambda x: isinstance(x, tuple) and all(map(is_whole, x)), lambda xs: True),
    "workers": (lambda x: isinstance(x, Worker), lambda xs: len(xs) > 0),
    "devices": (lambda x: isinstance(x, jax.Device), lambda xs: True),
    "shape": (lambda x: is_whole(x) and x >= 0, lambda xs: True),
    "policies": (lambda x: isinstance(x, samx.policies.Policy), lambda xs: len(xs) == 2),
    "boundaries": (lambda x: is_whole(x) and 0 <= x < 2**31, lambda xs: len(xs) == 1),
    "bounds": (lambda x: is_real(x) and 0 < x < np.inf, lambda xs: len(xs) == 2),
}
ARRAYS = {  # shape or None, whether of integers
    "weights": ((SIZE,), False),
    **dict.fromkeys(("logits", "teacher"), ((2, 3), False)),
    "labels": ((2,), True),
    "scores": ((4,), False),
    "probabilities": ((4,), False),
    "noise": ((4,), False),
    "position": ((1, 2), True),
    "values": ((2,), False),
    **dict.fromkeys(("grid", "alphas", "betas"), ((3,), False)),
    **dict.fromkeys(("w_norm", "g_norm", "total"), ((), False)),
}
TREES = {"params", "base_params", "eps", "center", "move", "tree", "scales", "opt_state"}
TREES |= {"a", "b", "g", "direction", "directions", "vectors"}
COMPARED = {"eps", "move", "scales", "base_params", "opt_state"}
COMPARED |= {"b", "direction", "directions", "vectors"}
SHAPES_SUFFICE = ("state_specs", "layer_scales", "learning_rates", "constants", "mup_sam")
MAY_BE_NONE = {"le_sam.rho_max", "loss_rise_ball.rho_max"}  # although it is not the default
RECORDS = {"resume": Checkpoint, "event": Event, "rule": Rule, "engine": Threads}


class Argument(NamedTuple):
    """One argument of one public callable."""

    owner: str
    name: str
    kind: str
    default: Any
    arity: int
    choices: tuple[Any, ...]
    good: Any
    is_given: bool  # in a right call

    @property
    def is_optional(self):
        return self.default is not inspect.Parameter.empty

    @property
    def full_name(self):
        return full_name(self.owner, self.name)


def full_name(owner, name):
    return f"{owner.rsplit('.', 1)[-1]}.{name}"


def arguments_of(owner, signature):
    """Return the arguments of a callable with this signature, by name."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        p.name: argument(owner, p) for p in signature.parameters.values() if p.kind not in kinds
    }


def argument(owner, parameter):
    annotation, name = parameter.annotation, parameter.name
    parts = [part for a in (annotation, *get_args(annotation)) for part in (a, *get_args(a))]
    literals = [get_args(part) for part in parts if get_origin(part) is Literal]
    function = next((part for part in parts if "Callable" in str(get_origin(part))), None)
    inputs = get_args(function)[0] if function else ()
    arity = -1 if inputs is Ellipsis else len(inputs)
    kind = kind_of(annotation, parameter, bool(function), literals)
    if owner.endswith(".edge"):
        kind = "numbers"
    choices, default, full = (
        literals[0] if literals else (),
        parameter.default,
        full_name(owner, name),
    )
    is_given = full in GOOD or default is parameter.empty
    good = GOOD.get(full, GOOD.get(name)) if is_given else default
    return Argument(owner, name, kind, default, arity, choices, good, is_given)


def kind_of(annotation, parameter, is_function, literals):
    name, text = parameter.name, str(annotation)
    if annotation in (Radius, ScalarOrSchedule, ScalarOrSchedule | None):
        return "hyperparam"
    if annotation is Perturbation:
        return "transformation"
    if name in ("key", "groups", "ascent", "axis_name", "policy", "path"):
        return name
    if name == "pattern" and literals:
        return name
    if name in ("model", "optimizer", "wrt") and not literals:
        return name
    if name.endswith("_axis"):
        return "integer" if annotation is int else "axis"
    if name in SEQUENCES:
        return "sequence"
    if name in ARRAYS and not literals:
        return "array"
    if name in RECORDS:
        return "record"
    if name == "aux_like":
        return "aux"
    if annotation in (float, float | None, float | jax.Array) or isinstance(
        parameter.default, float
    ):
        return "number"
    if annotation in (int, int | None):
        return "count"
    if annotation is bool:
        return "flag"
    if annotation is DType or name == "center_dtype":
        return "dtype"
    if annotation in (str, str | None):
        return "text"
    if "GradientTransformation" in text:
        return "transformation"
    if literals:
        return "choice"
    if name in ("batch", "batch_like"):
        return "batch"
    if name in TREES:
        return "tree"
    if is_function and name != "measures":
        return "function"
    return {
        "f": "loss",
        "draws": "draws",
        "measures": "measures",
        "values_like": "values_like",
        "batches": "iterable",
        "worker_options": "mapping",
        "descent_device": "device",
        "ascent_device": "device",
        "pair_sharding": "sharding",
        "batch_specs": "specs",
        "param_specs": "specs",
    }.get(name, "anything")


# The values that every argument gets, whatever its kind is.
VALUES = {
    "None": None,
    "True": True,
    "np.True_": np.True_,
    "a true array": jnp.array(True),
    "0": 0,
    "1": 1,
    "3": 3,
    "-1": -1,
    "-1e9": -1e9,
    "10**400": 10**400,
    "2**70": 2**70,
    "0.5": 0.5,
    "1.5": 1.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": -float("inf"),
    "0.1j": 0.1j,
    "np.float32(0.5)": np.float32(0.5),
    "np.float64(0.5)": np.float64(0.5),
    "np.int64(1)": np.int64(1),
    "np.uint64(2**64-1)": np.uint64(2**64 - 1),
    "np.array(0.5)": np.array(0.5),
    "np.array(3)": np.array(3),
    "np.array([0.5])": np.array([0.5]),
    "np.array(nan)": np.array(np.nan),
    "np.array('x')": np.array("x"),
    "np.array(None)": np.array(None),
    "np.datetime64": np.datetime64("2026-01-01"),
    "jnp.array(0.5)": jnp.array(0.5),
    "jnp.array(3)": jnp.array(3),
    "jnp.array([0.1, 0.2])": jnp.array([0.1, 0.2]),
    "jnp.array(inf)": jnp.array(jnp.inf),
    "Decimal": Decimal("0.5"),
    "Fraction": Fraction(1, 2),
    "'0.1'": "0.1",
    "'wrong'": "wrong",
    "''": "",
    "'float32'": "float32",
    "b'x'": b"x",
    "[0.5]": [0.5],
    "[1, 2]": [1, 2],
    "['a']": ["a"],
    "[None]": [None],
    "(0.5, 2.0)": (0.5, 2.0),
    "(1, 2)": (1, 2),
    "(2, 1)": (2, 1),
    "(np.int64(1), np.int64(2))": (np.int64(1), np.int64(2)),
    "[]": [],
    "{}": {},
    "{'a': 0.5}": {"a": 0.5},
    "{'norm': 'x', 'b': 1}": {"norm": "x", "b": 1},
    "{1, 2}": {1, 2},
    "an object": object(),
    "lambda x: 0.5": lambda x: 0.5,
    "lambda: 0.5": lambda: 0.5,
    "lambda x, y: True": lambda x, y: True,
    "lambda x, y, z: x": lambda x, y, z: x,
    "a schedule of None": lambda step: None,
    "a schedule of texts": lambda step: "0.5",
    "a schedule of vectors": lambda step: jnp.ones(2),
    "a schedule of NaN": lambda step: jnp.nan * step,
    "float": float,
    "np.float32": np.float32,
    "optax.sgd": optax.sgd,
    "sgd": SGD,
    "asam": samx.asam(),
    "sam in a chain": optax.chain(samx.sam(), SGD),
    "a policy": samx.policies.every(2),
    "a policy of numbers": samx.policies.Policy(1, 2),
    "a worker": worker(),
    "a key": jax.random.key(0),
    "two keys": jax.random.split(jax.random.key(0)),
    "a shape": jax.ShapeDtypeStruct((), jnp.float32),
    "P('pair')": PartitionSpec("pair"),
    "P()": PartitionSpec(),
    "a device": CPU,
    "a range": range(1, 3),
    "a module": samx,
    "params": PARAMS,
    "batch": BATCH,
    "ragged": {"x": jnp.ones((4, 2)), "y": jnp.ones(3)},
    "a checkpoint": Checkpoint(PARAMS, np.array([0, 0])),
    "a checkpoint of texts": Checkpoint(PARAMS, np.array(["a", "b"])),
    "a checkpoint below 0": Checkpoint(PARAMS, np.array([-1, 0])),
    "a rule": Rule(),
    "an objective": OBJECTIVE,
}

NO_SCHEDULES = ("a schedule of None", "a schedule of texts", "a schedule of vectors", "optax.sgd")


REAL = (jnp.integer, jnp.floating)


def is_array(value):
    return isinstance(value, jax.Array | np.ndarray | np.generic)


def is_real(value):
    """Whether this is one real number of Python, NumPy or JAX."""
    if is_array(value):
        return value.shape == () and any(jnp.issubdtype(value.dtype, kind) for kind in REAL)
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value):
    """Whether this is one whole number of Python or NumPy."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool | np.bool_ | jax.Array) and np.ndim(value) == 0


def takes(value, arity):
    """Whether a value can be called with so many arguments; None where nobody can know."""
    if not callable(value):
        return False
    is_record = hasattr(value, "_fields") or dataclasses.is_dataclass(value)
    if isinstance(value, type) and not is_record:
        return False  # it makes its own instances
    if arity < 0:
        return None
    try:
        inspect.signature(value).bind(*[None] * arity)
    except TypeError:
        return False
    except ValueError:
        return None
    return None  # what it returns, only a call tells


def is_transformation(value):
    return hasattr(value, "init") and hasattr(value, "update")


def is_sharpness_aware(value):
    """Whether this takes the gradient at a perturbed point, so that it needs the loss."""
    return is_transformation(value) and not isinstance(value, type) and has_readings(value)


@cache
def has_readings(tx):
    state = jax.eval_shape(tx.init, PARAMS)
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, samx.Readings))
    return any(isinstance(leaf, samx.Readings) for leaf in leaves)


def as_float(value):
    return float("inf") if isinstance(value, int) and value > 10**300 else float(value)


def is_right_number(a, value):
    if not is_real(value):
        return False
    is_free = a.name == "threshold"  # the only one that may be infinite
    number = as_float(value)
    largest = 1e30 if a.name == "min_loss" else LARGE  # a loss may be negative
    is_large = abs(number) > largest and not (is_free and isinstance(value, float))
    if np.isnan(number) or (is_large and not (is_free and is_array(value))):
        return False
    is_good = is_real(a.good) and number == as_float(a.good)
    return True if is_good and not isinstance(value, jax.Array) else None


def is_right_hyperparam(a, value):
    if value is None and (a.owner, a.name) == ("samx.lookbehind_sam", "alpha"):
        return True  # the adaptive α, which is not the default
    if isinstance(value, type):
        return False  # a class is no schedule
    if any(value is VALUES[name] for name in NO_SCHEDULES):
        return False  # it returns no number
    return takes(value, 1) if callable(value) else is_right_number(a, value)


def is_right_count(a, value):
    least = -1 if a.name == "start" else 0
    if not is_whole(value) or not least <= operator.index(value) < 2**31:
        return False
    is_good = is_whole(a.good) and operator.index(a.good) == operator.index(value)
    return True if is_good else None


def is_right_key(a, value):
    if is_array(value) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return value.shape == ()
    if isinstance(value, jax.Array):
        return value.shape == () and jnp.issubdtype(value.dtype, jnp.integer)
    return is_whole(value) and -(2**63) <= operator.index(value) < 2**63


def is_right_integer(a, value):
    return None if is_whole(value) else False


def are_right_numbers(a, value):
    """Whether these are numbers of any shape, as `edge` takes them; arrays may hold any number."""
    if is_array(value) and not isinstance(value, np.generic):
        return None if any(jnp.issubdtype(value.dtype, kind) for kind in REAL) else False
    return is_right_number(a, value)


def is_right_loss(a, value):
    return None if isinstance(value, samx.sharpness.Objective) else takes(value, 1)


def are_right_draws(a, value):
    """Whether this is the number of draws, or a tree of them."""
    if jax.tree.structure(value) == jax.tree.structure(PARAMS):
        return None if all(is_leaf(x) and np.ndim(x) for x in jax.tree.leaves(value)) else False
    return is_right_count(a, value)


def are_right_measures(a, value):
    if not isinstance(value, Mapping) or not value:
        return False
    are_functions = all(takes(fn, 2) is not False for fn in value.values())
    return None if are_functions and all(isinstance(name, str) for name in value) else False


def are_right_values(a, value):
    """Whether this names measures, and what their values are like."""
    is_known = isinstance(value, Mapping) and value.keys() <= GOOD["measures"].keys()
    return None if is_known and all(map(is_leaf, jax.tree.leaves(value))) else False


def is_right_flag(a, value):
    if isinstance(value, jax.Array):
        return None if value.shape == () and value.dtype == bool else False
    return isinstance(value, bool | np.bool_)


def is_right_dtype(a, value):
    if value is None:
        return True
    if not isinstance(value, str | type | np.dtype):
        return False
    try:
        return bool(jnp.issubdtype(jnp.dtype(value), jnp.floating))
    except TypeError:
        return False


def is_right_text(a, value):
    return isinstance(value, str) and (True if value else None)


def is_right_axis(a, value):
    return None if isinstance(value, str) and value else False


def are_right_axes(a, value):
    is_several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    axes = value if is_several else [value]
    return None if len(axes) and all(isinstance(x, str) and x for x in axes) else False


def is_right_transformation(a, value):
    if a.name == "perturbation" and is_sharpness_aware(value):
        return False
    return None if is_transformation(value) else False


def is_right_policy(a, value):
    if not isinstance(value, samx.policies.Policy):
        return False
    return all(map(callable, value))


def is_right_pattern(a, value):
    if isinstance(value, str):
        return value in ("unstructured", "structured")
    is_pair = isinstance(value, tuple) and len(value) == 2 and all(map(is_whole, value))
    return is_pair and 0 < value[0] <= value[1]  # no leaf of PARAMS is grouped


def is_right_sequence(a, value):
    is_element, is_whole_right = SEQUENCES[a.name]
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, np.number):
        value = np.asarray(value)
    is_vector = isinstance(value, np.ndarray) and value.ndim == 1
    if is_array(value) and not is_vector:
        return False
    kinds = Iterable if a.name in ("order", "drops") else Sequence
    if not is_vector and (not isinstance(value, kinds) or isinstance(value, str | bytes)):
        return False
    value = list(value)
    return None if all(map(is_element, value)) and is_whole_right(value) else False


def is_right_array(a, value):
    shape, is_integer = ARRAYS[a.name]
    if isinstance(value, Mapping | str | bytes | set) or is_transformation(value):
        return False
    try:
        found = np.asarray(value)
    except Exception:
        return False
    kinds = "iu" if is_integer else "biuf" if a.name == "weights" else "iuf"
    if found.dtype == object or found.dtype.kind not in kinds:
        return False
    is_fixed = a.name == "labels" or (
        a.name == "weights" and a.owner.endswith(("largest", "sampled"))
    )
    return None if found.shape == shape or not is_fixed else False


def is_right_batch(a, value):
    leaves = jax.tree.leaves(value)
    if not all(is_array(x) or isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        return False
    lengths = {x.shape[:1] for x in leaves}
    return None if len(lengths) == 1 and lengths != {()} else False


def is_leaf(value):
    """Whether this is an array, its shape or a number."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return False
    if isinstance(value, bool | int | float | complex):
        return True
    is_shape = isinstance(value, jax.ShapeDtypeStruct)
    return is_shape or (is_array(value) and getattr(value.dtype, "kind", "V") not in "OSUMm")


def is_right_aux(a, value):
    leaves = jax.tree.leaves(value)
    is_small = all(abs(int(x)) < 2**31 for x in leaves if is_whole(x))
    return None if all(map(is_leaf, leaves)) and is_small else False


def is_right_tree(a, value):
    leaves = jax.tree.leaves(value)
    are_arrays = all(map(is_leaf, leaves))
    if not a.owner.endswith(SHAPES_SUFFICE):
        are_arrays &= not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    is_like = jax.tree.structure(value) == jax.tree.structure(a.good)
    return None if are_arrays and (is_like or a.name not in COMPARED) else False


def is_right_record(a, value):
    if a.name == "engine":
        return None if hasattr(value, "start") and hasattr(value, "launch") else False
    if not isinstance(value, RECORDS[a.name]):
        return False
    if a.name == "resume":
        counts = np.asarray(value.exchanges)
        return None if counts.dtype.kind in "iu" and (counts >= 0).all() else False
    return None


RULES = {
    "hyperparam": is_right_hyperparam,
    "number": is_right_number,
    "count": is_right_count,
    "integer": is_right_integer,
    "numbers": are_right_numbers,
    "loss": is_right_loss,
    "draws": are_right_draws,
    "measures": are_right_measures,
    "values_like": are_right_values,
    "key": is_right_key,
    "flag": is_right_flag,
    "dtype": is_right_dtype,
    "text": is_right_text,
    "axis": is_right_axis,
    "axis_name": are_right_axes,
    "ascent": lambda a, v: v in ("global", "local") if isinstance(v, str) else are_right_axes(a, v),
    "transformation": is_right_transformation,
    "policy": is_right_policy,
    "pattern": is_right_pattern,
    "groups": lambda a, v: takes(v, 2) if callable(v) else is_right_count(a, v),
    "function": lambda a, v: takes(v, a.arity),
    "choice": lambda a, v: isinstance(v, str) and v in a.choices,
    "sequence": is_right_sequence,
    "array": is_right_array,
    "batch": is_right_batch,
    "tree": is_right_tree,
    "record": is_right_record,
    "aux": is_right_aux,
    "iterable": lambda a, v: None if isinstance(v, Iterable) else False,
    "mapping": lambda a, v: None if isinstance(v, Mapping) else False,
    "device": lambda a, v: None if isinstance(v, jax.Device) else False,
    "sharding": lambda a, v: None if isinstance(v, PartitionSpec) else False,
    "specs": lambda a, v: None,
    "path": lambda a, v: None if isinstance(v, tuple | list) else False,
    "model": lambda a, v: None if isinstance(v, nnx.Module) else False,
    "optimizer": lambda a, v: None if isinstance(v, nnx.Optimizer) else False,
    "wrt": lambda a, v: None,
    "anything": lambda a, v: None,
}


def is_right(a, value):
    """Whether a value is right for an argument: True, False, or None where it may be either."""
    if value is None and a.is_optional and a.default is None:
        return None if a.is_given else True  # a right call may need it
    if value is None and a.full_name in MAY_BE_NONE:
        return True
    return RULES[a.kind](a, value)
