"""Call everything that is public in samx with generated arguments, and judge what comes.

    python tests/fuzz.py                 all calls, a table, and what is not right
    python tests/fuzz.py --every 20      every 20th call
    python tests/fuzz.py --only looksam  the calls of one name

Every call is deterministic. Signatures generate them, with the rules for right values in
`support/arguments.py`. What comes is one of:

- clear error: a `TypeError` or `ValueError` that samx raises itself, with the name of the argument
  and what it got; Python's own error for a missing or an unknown argument; an exception of the
  caller's own function, unchanged.
- obscure error: any other exception, or a right value that is refused.
- accepted and right: the call returns, and the value may be right. Transformations, policies,
  schedules and iterators must also work in one step.
- accepted and wrong: the call and the step return, although the value is wrong.

Arrays that `update` gets are judged by structure, shape and dtype. Their values are data: nobody
can know them while tracing, and not-a-number comes out as not-a-number.
"""

import argparse
import collections
import dataclasses
import importlib
import inspect
import itertools
import pkgutil
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import fuzz_arguments as arguments
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from fuzz_arguments import BATCH, PARAMS, SGD, SIZE, VALUES, is_right, loss, losses
from jax.sharding import PartitionSpec

import samx

PACKAGE = str(Path(samx.__file__).parent)
COLUMNS = ("clear error", "obscure error", "accepted and right", "accepted and wrong")
FAILURES = {"obscure error", "accepted and wrong"}
PYTHONS_OWN = re.compile(
    r"missing .*argument|unexpected keyword|multiple values|takes .* positional"
)

WHAT_IT_GOT = re.compile(r"\b(got|missing|lacks|holds|found|is not|but the mean|arrived)\b")
OF_VALUES = {fn.__code__ for fn in VALUES.values() if inspect.isfunction(fn)}


class FromClosureError(Exception):
    """Raised by a closure of the caller."""


class Call(NamedTuple):
    """One call: what is wrong in it, what the wrong arguments are called, whether it may pass."""

    owner: str
    fault: str
    what: str
    names: tuple[str, ...]
    may_pass: bool | None
    run: Callable[[], Any]

    def __str__(self):
        return f"{self.owner}: {self.fault}: {self.what}"


class Verdict(NamedTuple):
    """What came of a call."""

    call: Call
    column: str
    message: str


# What is public.


def is_record(fn):
    """Whether this only holds what it is given."""
    is_checked = "__post_init__" in vars(fn) or "__init__" in vars(fn)
    is_dataclass = dataclasses.is_dataclass(fn) and not hasattr(fn, "__post_init__")
    return isinstance(fn, type) and (issubclass(fn, tuple) or is_dataclass or not is_checked)


@cache
def public():
    """Return every public callable by its full name, without the same one twice."""
    modules = [samx] + [
        importlib.import_module(info.name)
        for info in pkgutil.walk_packages(samx.__path__, "samx.")
        if "._" not in info.name
    ]
    found = {}
    for module in modules:
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if callable(value) and all(value is not other for other in found.values()):
                found[f"{module.__name__}.{name}"] = value
    return found


# Calls of factories and functions.


def good_call(found, **changes):
    """Return the keywords of a call with right values, but for the changes."""
    given = {name: a.good for name, a in found.items() if a.is_given}
    if found.keys() >= {"normalization", "width"} and changes.get("width") is not None:
        given["normalization"] = "layerwise"
    return given | changes


def calls_of(owner: str, fn: Any) -> Iterator[Call]:
    """Generate the calls of one public callable."""
    try:
        signature = inspect.signature(fn)
    except ValueError:
        return  # an exception
    found = arguments.arguments_of(owner, signature)
    run = partial(call_and_use, owner, fn, found)
    yield Call(owner, "nothing is wrong", "", (), True, partial(run, good_call(found)))
    for name, a in found.items():
        if not a.is_optional:
            given = {k: v for k, v in good_call(found).items() if k != name}
            yield Call(owner, "a missing argument", name, (name,), False, partial(run, given))
    yield from extra_arguments(owner, run, found)
    if is_record(fn):
        return
    for a in found.values():
        every, first = (
            (3, len(owner) % 3) if a.kind == "dtype" or fn is samx.elastic.train else (1, 0)
        )
        for what, value in list(VALUES.items())[first::every]:  # slow ones take turns
            given = good_call(found, **{a.name: value})
            may_pass = is_right(a, value)
            fault = f"a value for: {a.kind}"
            yield Call(owner, fault, f"{a.name}={what}", (a.name,), may_pass, partial(run, given))
    for a, b in itertools.combinations(found.values(), 2):
        if a.good is not b.good:
            names, are_right = (a.name, b.name), (is_right(a, b.good), is_right(b, a.good))
            may_pass = False if False in are_right else None
            call = partial(run, good_call(found, **{a.name: b.good, b.name: a.good}))
            yield Call(owner, "swapped arguments", " and ".join(names), names, may_pass, call)


def extra_arguments(owner, run, found):
    given = good_call(found)
    for name in ("unknown", "rho_", *(f"{name}s" for name in found)):
        if name not in found:
            call = partial(run, given | {name: 0.1})
            yield Call(owner, "an extra argument", name, (name,), False, call)
    count = len(found) + 1
    call = partial(run, {}, [0.1] * count)
    yield Call(owner, "an extra argument", f"{count} positional", tuple(found), False, call)


def call_and_use(owner, fn, found, given, positional=()):
    """Call it, and use what it returns once with right inputs."""
    if "axis_name" in given and owner == "samx.axis_mean":
        return mapped(lambda: fn(**given))

    def run():
        result = fn(*positional, **given)
        return result if is_record(fn) else use(result, owner, fn)

    is_measure = owner.startswith("samx.sharpness.")
    # Measures are only traced: to compute them all would take hours.
    return jax.eval_shape(lambda: (run(), jnp.ones(()))[1]) if is_measure else run()


def mapped(fn):
    """Trace a function where the axis `data` is mapped over one device."""
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    spec = PartitionSpec()
    mapped = jax.shard_map(lambda: (fn(), jnp.ones(()))[1], mesh=mesh, in_specs=(), out_specs=spec)
    return jax.eval_shape(mapped)


def use(result, owner, fn):
    if arguments.is_transformation(result):
        step = partial(trace_update, result)
        return mapped(step) if owner == "samx.data_parallel" else step()
    if isinstance(result, samx.policies.Policy):
        state = jax.eval_shape(result.init, PARAMS)
        return jax.eval_shape(result.decide, PARAMS, state)
    if isinstance(result, samx.sharpness.Objective):
        return result(PARAMS)
    if isinstance(result, Iterator):
        return list(itertools.islice(result, 30))
    if inspect.isfunction(result):
        return use_function(result, owner, fn)
    return result


def use_function(result, owner, fn):
    if owner == "samx.value_and_grad":
        return mapped(lambda: result(PARAMS))
    count = sum(p.default is p.empty for p in inspect.signature(result).parameters.values())
    if owner == "samx.flax.closure":
        return result(nnx.state(arguments.MODEL, nnx.Param))
    takes_params = ".perturbations." in owner or ".sharpness." in owner
    inputs = [PARAMS] if takes_params else [jnp.zeros((), jnp.int32)] * count
    if owner == "samx.fast_convolutions":  # of a function that may return anything
        return result(*inputs)
    return jax.eval_shape(result, *inputs)


# Calls of init and update.


def keywords():
    return {
        "value": 0.5,
        "value_fn": loss,
        "losses_fn": losses,
        "batch": BATCH,
        "weights": jnp.ones(SIZE),
        "labels": jnp.arange(SIZE) % 3,
        "index": jnp.arange(SIZE),
        "ascent_fn": lambda params: losses(params, BATCH).max(),
        "training_fn": lambda params: losses(params, BATCH).sum(),
        "validation_fn": lambda params: losses(params, BATCH).min(),
        "apply_fn": arguments.logits_of,
        "loss_on_logits": arguments.loss_on_logits,
        "teacher_fn": arguments.logits_of,
        "features_fn": arguments.features_of,
        "head_fn": arguments.head_on,
        "merge_fn": lambda params: params,
    }


NOT_GIVEN = object()
PARTS = ("apply_fn", "teacher_fn", "features_fn", "head_fn")


def trace_update(tx, g=PARAMS, state=NOT_GIVEN, params=PARAMS, **changes):
    """Trace `init` and `update` with right inputs, but for the changes."""
    state = jax.eval_shape(tx.init, PARAMS) if state is NOT_GIVEN else state
    extra = {k: v for k, v in (keywords() | changes).items() if v is not NOT_GIVEN}
    return shapes_of(partial(tx.update, **extra), g, state, params)


def shapes_of(fn, *trees):
    """Trace a function of trees; what is no array in them is passed as it is."""
    leaves, structure = jax.tree.flatten(trees)
    places = [i for i, x in enumerate(leaves) if is_traceable(x)]

    def traced(*arrays):
        new = list(leaves)
        for i, x in zip(places, arrays, strict=True):
            new[i] = x
        fn(*jax.tree.unflatten(structure, new))

    return jax.eval_shape(traced, *(leaves[i] for i in places))


def is_traceable(x):
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct)


def raising(*_):
    """Fail as a closure of the caller may."""
    raise FromClosureError


def scalar_results():
    return {
        "nothing": None,
        "a tuple of 3": (jnp.ones(()), 1, 2),
        "a tuple of 1": (jnp.ones(()),),
        "a text": "0.5",
        "a complex number": jnp.ones((), jnp.complex64),
        "an integer": jnp.ones((), jnp.int32),
        "a boolean": jnp.ones((), bool),
        "a vector": jnp.ones(SIZE),
        "a list": [jnp.ones(())],
        "a dict": {"loss": jnp.ones(())},
        "an object": object(),
    }


def losses_results():
    others = {"a vector": jnp.ones(SIZE + 1), "a scalar": jnp.ones(())}
    others |= {"a matrix": jnp.ones((SIZE, 1)), "a list of numbers": [0.5] * SIZE}
    others |= {"integers": jnp.ones(SIZE, jnp.int32), "complex": jnp.ones(SIZE, jnp.complex64)}
    return {k: v for k, v in scalar_results().items() if "number" not in k} | others


def no_functions():
    return {"a number": 0.5, "a text": "x", "a list": [loss], "sgd": SGD, "an array": jnp.ones(3)}


def arrays(integer):
    """Wrong and right arrays `[B]`."""
    dtype = jnp.int32 if integer else jnp.float32
    other = jnp.float32 if integer else jnp.complex64
    found = {
        "too short": (jnp.ones(SIZE - 1, dtype), False),
        "too long": (jnp.ones(SIZE + 1, dtype), False),
        "one number": (jnp.ones((), dtype), False),
        "a Python number": (1, False),
        "a matrix": (jnp.ones((SIZE, 1), dtype), False),
        "another dtype": (jnp.ones(SIZE, other), False),
        "a text": ("wrong", False),
        "a list of texts": (["a"] * SIZE, False),
        "a dict": ({"a": jnp.ones(SIZE, dtype)}, False),
        "an object": (object(), False),
        "keys": (jax.random.split(jax.random.key(0), SIZE), False),
        "below 0": (-jnp.ones(SIZE, dtype), None),
        "of NumPy": (np.ones(SIZE, np.int64 if integer else np.float64), None),
        "a list": ([1] * SIZE, None),
        "booleans": (jnp.ones(SIZE, bool), None),
    }
    return found if integer else found | {"nan": (jnp.full(SIZE, jnp.nan), None)}


def wrong_values():
    wrong = {"a text": "x", "complex": 1j, "a vector": jnp.ones(2), "a dict": {"a": 1.0}}
    right = {"None": None, "an int": 1, "np": np.float32(1), "an array": jnp.ones(())}
    found = {what: (v, False) for what, v in (wrong | {"True": True}).items()}
    return found | {what: (v, None) for what, v in right.items()}


def batches():
    x = BATCH["x"]
    wrong = {
        "ragged": {"x": x, "y": jnp.ones(SIZE - 1)},
        "scalars": {"x": jnp.ones(()), "y": 0.5},
        "one scalar": {"x": x, "y": 0.5},
        "nothing": {},
        "no examples": {"x": x[:0], "y": jnp.ones(0)},
        "a text": "wrong",
        "texts": {"x": "a", "y": "b"},
        "one text": {"x": x, "y": "b"},
        "a number": 3,
        "an object": object(),
    }
    found = {what: (v, False) for what, v in wrong.items()}
    return found | {"None": (None, None), "a list": ([x, BATCH["y"]], None)}


def trees(is_gradient):
    """Wrong and right trees in the place of the gradients or the parameters."""
    w, head, b = PARAMS.values()
    masked = optax.MaskedNode()
    wrong = {
        "None": None,
        "nothing": {},
        "a leaf less": {"norm": w, "head": head},
        "a leaf more": PARAMS | {"c": b},
        "a list": [w, head, b],
        "an array": w,
        "a text": "wrong",
        "a text leaf": {"head": head, "norm": w, "b": "x"},
        "an object leaf": {"head": head, "norm": w, "b": object()},
        "a masked leaf": {"head": head, "norm": masked, "b": b},
        "a longer leaf": {"head": head, "norm": jnp.ones(3), "b": b},
        "a column": {"head": head, "norm": w[:, None], "b": b},
        "a number for a vector": {"head": head, "norm": b, "b": b},
    }
    if is_gradient:
        wrong["complex"] = jax.tree.map(lambda x: x.astype(jnp.complex64), PARAMS)
    found = {what: (v, False) for what, v in wrong.items()}
    found |= {"a None leaf": ({"head": head, "norm": w, "b": None}, None)}
    for dtype in (jnp.float16, jnp.int32):
        cast = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), PARAMS)
        found[jnp.dtype(dtype).name] = (cast, None)
    return found | {"of NumPy": (jax.tree.map(np.asarray, PARAMS), None)}


def states(tx):
    """States of others, in the place of the state."""
    own = jax.tree.structure(jax.eval_shape(tx.init, PARAMS))
    others = {
        "None": None,
        "()": (),
        "a number": 3,
        "a text": "wrong",
        "a dict": {"step": jnp.zeros((), jnp.int32)},
        "of looksam": samx.looksam().init(PARAMS),
        "of lets": samx.lets(SGD).init(PARAMS),
        "of adam": optax.adam(0.1).init(PARAMS),
        "of metric_ball": samx.perturbations.metric_ball(0.1).init(PARAMS),
        "of other parameters": tx.init({"v": jnp.ones(3)}),
        "in a tuple": (tx.init(PARAMS),),
    }
    for what, state in others.items():
        may_pass = jax.tree.structure(state) == own or not own.num_leaves
        yield what, state, None if may_pass else False


@cache
def is_read(tx, keyword):
    """Whether `update` calls this function of the caller."""
    try:
        trace_update(tx, **{keyword: raising})
    except FromClosureError:
        return True
    return False


@cache
def is_needed(tx, keyword):
    try:
        trace_update(tx, **{keyword: NOT_GIVEN})
    except Exception:
        return True
    return False


def calls_of_transformation(owner: str, make: Callable[[], Any]) -> Iterator[Call]:
    """Generate the calls of `init` and `update` of what a factory returns."""
    tx = make()
    update = partial(trace_update, tx)

    def call(fault, what, keyword, may_pass, names=None, **changes):
        what = f"{keyword}: {what}"
        return Call(owner, fault, what, names or (keyword,), may_pass, partial(update, **changes))

    for what, (params, may_pass) in trees(False).items():
        may_pass = False if isinstance(params, str) or "text" in what or "object" in what else None
        if what != "None":
            run = partial(shapes_of, tx.init, params)
            yield Call(owner, "init: params", what, ("params",), may_pass, run)
    ignores_params = accepts(lambda: trace_update(tx, params=None))
    for what, (params, may_pass) in trees(False).items():
        may_pass = None if ignores_params else may_pass
        names = ("params", "grads", "updates", "state")
        yield call("update: params", what, "params", may_pass, names, params=params)
    for what, (g, may_pass) in trees(True).items():
        yield call("update: gradients", what, "grads", may_pass, ("grads", "updates"), g=g)
    for what, state, may_pass in states(tx):
        yield call("update: state", what, "state", may_pass, state=state)
    functions = ("value_fn", "losses_fn", "ascent_fn", "training_fn", "validation_fn")
    for keyword in (*functions, *PARTS, "loss_on_logits", "merge_fn"):
        yield from closure_calls(call, tx, keyword)
    for keyword in keywords():
        names = (keyword, "value_fn", "losses_fn", "batch")
        may_pass = False if is_needed(tx, keyword) else None
        yield call("update: missing", keyword, keyword, may_pass, names, **{keyword: NOT_GIVEN})
    wrong = {"batch": batches(), "value": wrong_values(), "weights": arrays(False)}
    wrong |= {"labels": arrays(True), "index": arrays(True)}
    checks = accepts_keyword(tx)
    for keyword, found in wrong.items():
        is_used = checks and (keyword in ("batch", "weights", "value") or is_needed(tx, keyword))
        for what, (value, may_pass) in list(found.items())[: None if is_used else 1]:
            may_pass = may_pass if is_used else None
            changes = {keyword: value} | ({"weights": NOT_GIVEN} if keyword == "batch" else {})
            yield call(f"update: {keyword}", what, keyword, may_pass, **changes)
    yield call("update: unknown keyword", "unknown", "unknown", None, unknown=3)


def accepts(run):
    try:
        run()
    except Exception:
        return False
    return True


def accepts_keyword(tx):
    """Whether `update` reads the keywords of the contract."""
    return any(is_read(tx, k) for k in ("value_fn", "losses_fn", "ascent_fn", "apply_fn"))


def closure_calls(call, tx, keyword):
    fault, is_used = f"update: {keyword}", is_read(tx, keyword)
    is_checked = accepts_keyword(tx)
    for what, value in no_functions().items():
        yield call(fault, what, keyword, False if is_checked else None, **{keyword: value})
    if not is_used:
        return
    is_scalar = keyword in ("value_fn", "ascent_fn", "training_fn", "validation_fn")
    results = scalar_results() if is_scalar else losses_results()
    if keyword in PARTS:
        del results["a matrix"]  # as logits are
    for what, result in results.items():
        fn = partial(lambda result, *args: result, result)
        yield call(fault, f"returns {what}", keyword, False, **{keyword: fn})
    yield call(fault, "raises", keyword, False, **{keyword: raising})
    yield call(fault, "takes nothing", keyword, False, **{keyword: lambda: jnp.ones(())})
    yield call(fault, "takes three", keyword, False, **{keyword: lambda a, b, c: jnp.ones(())})


# The judge.


def all_calls(only: str = "") -> Iterator[Call]:
    """Generate the calls of everything public whose name contains `only`."""
    for owner in public():
        if only in owner:
            yield from calls_of_one(owner)


def calls_of_one(owner: str) -> Iterator[Call]:
    """Generate the calls of one public callable, and of `init` and `update` if it is a factory."""
    fn = public()[owner]
    yield from calls_of(owner, fn)
    if is_factory(owner, fn):
        found = arguments.arguments_of(owner, inspect.signature(fn))
        yield from calls_of_transformation(owner, partial(fn, **good_call(found)))


@cache
def is_factory(owner, fn):
    if isinstance(fn, type) or owner == "samx.data_parallel":
        return False
    found = arguments.arguments_of(owner, inspect.signature(fn))
    try:
        return arguments.is_transformation(fn(**good_call(found)))
    except Exception:
        return False


def judge(call: Call) -> Verdict:
    """Make a call and judge what comes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call.run()
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        if call.may_pass:
            return Verdict(call, "obscure error", f"right, but refused: {message}")
        is_fine = is_clear(error, call)
        return Verdict(call, "clear error" if is_fine else "obscure error", message)
    column = "accepted and wrong" if call.may_pass is False else "accepted and right"
    return Verdict(call, column, "")


def is_clear(error: Exception, call: Call) -> bool:
    """Whether the error tells which argument is wrong, and what it got."""
    if isinstance(error, FromClosureError) or is_from_callers_function(error):
        return True
    message = str(error)
    if isinstance(error, TypeError) and PYTHONS_OWN.search(message):
        return not is_raised_in_package(error)
    is_quoted = "every worker has died; " in message  # `train` quotes it
    is_error_of_argument = is_quoted or isinstance(error, TypeError | ValueError)
    if not (is_error_of_argument and is_raised_in_package(error)):
        return False
    is_named = any(f"`{name}" in message for name in (*call.names, "schedule(step)"))
    is_named |= "state" in call.names and "the state's `" in message
    if call.may_pass is None:  # it may collide with another argument
        is_named = "`" in message
    return is_named and bool(WHAT_IT_GOT.search(message))


def is_raised_in_package(error):
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE)


def is_from_callers_function(error):
    """Whether a function that was an argument ran last, and not samx."""
    last = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            last = "samx"
        elif code.co_filename == arguments.__file__ or code in OF_VALUES:
            last = "caller"
    return last == "caller"


def table(verdicts) -> str:
    """Return the table: kinds of fault and what came of them."""
    counts = collections.defaultdict(collections.Counter)
    for verdict in verdicts:
        counts[verdict.call.fault][verdict.column] += 1
        counts["all"][verdict.column] += 1
    width = max(map(len, counts))
    lines = [f"{'':{width}}" + "".join(f"  {column:>18}" for column in COLUMNS)]
    order = [fault for fault in counts if fault != "all"] + ["all"]
    for fault in order:
        cells = "".join(f"  {counts[fault][column]:18}" for column in COLUMNS)
        lines.append(f"{fault:{width}}{cells}")
    return "\n".join(lines)


def failures(verdicts) -> list[str]:
    """Return a line for each call with an obscure error, or accepted although it is wrong."""
    return [
        f"{v.column}: {v.call}" + (f": {' '.join(v.message.split())[:160]}" if v.message else "")
        for v in verdicts
        if v.column in FAILURES
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="make every N-th call")
    parser.add_argument("--only", default="", help="a part of a name, default all")
    options = parser.parse_args()
    from tqdm import tqdm

    calls = list(all_calls(options.only))[:: options.every]
    verdicts = [judge(call) for call in tqdm(calls, disable=None)]
    found = failures(verdicts)
    print(*found, table(verdicts), sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
