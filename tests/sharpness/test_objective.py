"""What is measured: closures of the contract, weights, batches, dtypes; and what is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from measured import REFERENCE, net_loss, net_params
from regimes import mapped, mesh_of, place

import samx
from samx import sharpness

pytestmark = pytest.mark.usefixtures("float64")


def measure(f, params):
    """Measure with products of every kind; numbers only."""
    v = jax.tree.map(jnp.cos, params)
    found = sharpness.eigenvalues(f, params, k=1, iterations=3)
    return {
        "loss": f(params),
        "hvp": sharpness.hvp(f, params)(v),
        "ggn": sharpness.ggn_vp(f, params)(v),
        "fisher": sharpness.diagonal(f, params, operator="empirical_fisher", draws=2),
        "values": found.values,
        "residuals": found.residuals,
    }


def measure_all(f, params):
    grid = jnp.linspace(-0.1, 0.7, 5)
    return measure(f, params) | {
        "vectors": jax.tree.map(jnp.abs, sharpness.eigenvalues(f, params, iterations=9).vectors),
        "extreme": sharpness.extreme_eigenvalue(f, params, operator="ggn", iterations=6)[::2],
        "trace": sharpness.trace(f, params, draws=4),
        "frobenius": sharpness.frobenius(f, params, draws=3),
        "moments": sharpness.moments(f, params, draws=3),
        "density": sharpness.density(f, params, grid, sigma=0.05, iterations=5, draws=2),
    }


MEASURES = [measure, pytest.param(measure_all, marks=pytest.mark.slow)]


@functools.cache
def expected(measure=measure):
    with jax.enable_x64(True):
        return jax.jit(lambda params: measure(net_loss(), params))(net_params())


def assert_same(found, wanted, atol=1e-10):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), found, dict(wanted)
    )


@pytest.mark.slow
def test_padding_of_weight_zero_and_batches_that_do_not_divide_the_examples():
    data, _ = problem.make()
    data = jax.tree.map(lambda x: jnp.concatenate([x[:3], x]), data)
    weights = jnp.concatenate([jnp.zeros(3), jnp.full(64, 2.5)])
    f = net_loss(data, weights=weights, num_batches=7)
    assert_same(jax.jit(measure)(f, net_params()), expected())


@pytest.mark.slow
def test_seven_batches():
    assert_same(jax.jit(measure)(net_loss(num_batches=7), net_params()), expected())


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.slow
def test_sharded_examples_and_parameters(axis_type, measure):
    mesh = mesh_of(axis_type=axis_type)
    specs = {"W1": P(None, "data"), "W2": P("data"), "b1": P("data"), "b2": P()}
    params = place(net_params(), mesh, specs)
    data = place(problem.make()[0], mesh, P("data"))

    def gather(params):
        return jax.tree.map(lambda x: jax.sharding.reshard(x, P()), params)

    def logits_of(params, batch):
        return problem.logits_of(
            gather(params) if axis_type == AxisType.Explicit else params, batch
        )

    with jax.set_mesh(mesh):
        run = jax.jit(
            lambda params, data: measure(replace_apply(net_loss(data), logits_of), params)
        )
        assert_same(run(params, data), expected(measure))


def replace_apply(f, apply_fn):
    return sharpness.objective(apply_fn=apply_fn, loss_on_logits=f.loss_on_logits, batch=f.batch)


# In the default run, `test_devices_of_unequal_weights` and the monitor's `test_devices` see
# products inside `shard_map`, and `test_measures_on_devices.py` batches.
@pytest.mark.slow
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("regime", ["shard_map", "shard_map without check_vma", "pmap"])
def test_inside_mapped_functions(regime, measure):
    data, _ = problem.make()

    def run(params, x, y):
        return measure(net_loss({"x": x, "y": y}, axis_name="data", num_batches=3), params)

    assert_same(mapped(run, regime, 2)(net_params(), data["x"], data["y"]), expected(measure))


def test_devices_of_unequal_weights():
    """Padding that fills whole devices changes nothing."""
    data, _ = problem.make()
    weights = jnp.arange(64.0) % 5 * (jnp.arange(64) > 10)

    def run(params, x, y, weights):
        f = net_loss({"x": x, "y": y}, weights=weights, axis_name="data")
        return sharpness.trace(f, params, draws=3), sharpness.trace(
            f, params, operator="ggn", draws=3
        )

    wanted = jax.jit(run_on_one_device)(data, weights)
    found = mapped(run, "shard_map", 3)(net_params(), data["x"], data["y"], weights)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), found, wanted)


def run_on_one_device(data, weights):
    f = net_loss(data, weights=weights)
    return (
        sharpness.trace(f, net_params(), draws=3),
        sharpness.trace(f, net_params(), operator="ggn", draws=3),
    )


def test_an_objective_is_an_argument_of_a_compiled_function():
    f = sharpness.objective(losses_fn=problem.losses_fn, batch=problem.make()[0])
    compiled = jax.jit(lambda f, params: f(params))
    np.testing.assert_allclose(compiled(f, net_params()), expected()["loss"], rtol=1e-12)
    compiled(f, net_params())
    assert compiled._cache_size() == 1


def test_vmap_over_seeds():
    """Each lane has its own parameters and its own start."""
    params = jax.tree.map(lambda w: jnp.stack([w, 0.5 * w]), net_params())
    keys = jax.random.split(jax.random.key(3), 2)

    def top(params, key):
        return sharpness.eigenvalues(net_loss(), params, k=1, iterations=20, key=key).values

    found = jax.jit(jax.vmap(top))(params, keys)
    single = jax.jit(top)
    lanes = jax.tree.map(np.asarray, params)
    wanted = [single(jax.tree.map(lambda w, i=i: w[i], lanes), keys[i]) for i in range(2)]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_parameters_of_every_kind():
    """Half precision is measured in float32, complex numbers as two real ones, integers not."""
    params = {
        "half": jnp.ones(2, jnp.bfloat16),
        "complex": jnp.array([1 + 2j, 0.5j]),
        "count": jnp.arange(3),
        "real": jnp.float32(2.0),
    }

    def loss(w):
        z = w["complex"]
        parts = 3 * z.real**2 + 0.5 * z.imag**2
        return parts.sum() + 2 * (w["half"].astype(float) ** 2).sum() + 5 * w["real"] ** 2 / 2

    found = jax.jit(lambda w: sharpness.eigenvalues(loss, w, k=7, iterations=7))(params)
    np.testing.assert_allclose(found.values, [6, 6, 5, 4, 4, 1, 1], rtol=1e-6)
    assert found.vectors["half"].dtype == jnp.float32
    assert jnp.iscomplexobj(found.vectors["complex"])
    assert not np.any(found.vectors["count"])
    assert found.vectors["count"].shape == (7, 3)
    diagonal = jax.jit(lambda w: sharpness.diagonal(loss, w, draws=2).mean)(params)
    np.testing.assert_allclose(diagonal["complex"], [6 + 1j, 6 + 1j], rtol=1e-6)
    vector = {"half": jnp.ones(2), "complex": jnp.array([1, 1j]), "count": None, "real": 1.0}
    product = jax.jit(sharpness.hvp(loss, params))(vector)
    np.testing.assert_allclose(product["complex"], [6, 1j], rtol=1e-6)


def test_scalar_parameters_and_a_scalar_closure():
    np.testing.assert_allclose(sharpness.hvp(lambda w: w**3, 2.0)(1.0), 12)
    f = sharpness.objective(value_fn=lambda w: (w**3, "aux"))
    np.testing.assert_allclose(sharpness.trace(f, 2.0, draws=2).mean, 12)


def test_nothing_forms_a_matrix_of_parameters():
    """No array in the program is larger than the basis: (iterations + 1) copies."""
    jaxpr = str(jax.make_jaxpr(lambda w: measure(net_loss(), w))(net_params()))
    sizes = [
        np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\[([\d,]+)\]", jaxpr)
    ]
    assert max(sizes) <= max(9 * 227, 64 * 16 * 2)


W = np.ones(3, np.float32)
BATCH = np.eye(4, 3, dtype=np.float32)


def losses(w, x):
    return (x @ w) ** 2


def of_losses(**changes):
    return sharpness.objective(**{"losses_fn": losses, "batch": BATCH} | changes)


def quadratic_loss(w):
    return w @ w


WRONG = {
    "no loss": (lambda: sharpness.objective(), ValueError, "`value_fn`"),
    "half of the parts": (
        lambda: sharpness.objective(apply_fn=losses, batch=BATCH),
        ValueError,
        "`loss_on_logits`",
    ),
    "twice the losses": (
        lambda: of_losses(apply_fn=losses, loss_on_logits=losses),
        ValueError,
        "not both",
    ),
    "two objectives": (lambda: of_losses(value_fn=quadratic_loss), ValueError, "not both"),
    "no batch": (lambda: sharpness.objective(losses_fn=losses), ValueError, "`batch` is missing"),
    "a batch of nothing": (
        lambda: sharpness.objective(value_fn=quadratic_loss, batch=BATCH),
        ValueError,
        "`batch` needs",
    ),
    "weights": (lambda: of_losses(weights=np.ones(3)), ValueError, "`weights`"),
    "weights of nothing": (
        lambda: sharpness.objective(value_fn=quadratic_loss, weights=np.ones(3)),
        ValueError,
        "`weights`",
    ),
    "ragged": (lambda: of_losses(batch=[BATCH, W]), ValueError, "leading axis"),
    "batches": (lambda: of_losses(num_batches=5), ValueError, "`num_batches`"),
    "no function": (lambda: of_losses(losses_fn=3), TypeError, "`losses_fn`"),
    "one argument": (lambda: of_losses(losses_fn=quadratic_loss), TypeError, "2 arguments"),
    "an axis": (lambda: of_losses(axis_name=3), TypeError, "`axis_name`"),
    "no axis here": (lambda: of_losses(axis_name="data")(W), ValueError, "'data' is not"),
    "f": (lambda: sharpness.trace(3, W), TypeError, "trace: `f`"),
    "f of two": (lambda: sharpness.trace(losses, W), TypeError, "`f`"),
    "a vector": (lambda: sharpness.trace(lambda w: w, W), ValueError, "scalar"),
    "text": (lambda: sharpness.trace(quadratic_loss, {"w": "a"}), TypeError, "`params`"),
    "integers": (lambda: sharpness.trace(quadratic_loss, np.arange(3)), ValueError, "floating"),
    "a direction": (lambda: sharpness.hvp(quadratic_loss, W)(np.ones(2)), ValueError, "`v`"),
    "a tree": (lambda: sharpness.ggn_vp(two_parts(), W)({"a": W}), TypeError, "`v`"),
    "no logits": (lambda: sharpness.ggn_vp(of_losses(), W), ValueError, "apply_fn=apply"),
    "no logits at all": (
        lambda: sharpness.eigenvalues(quadratic_loss, W, k=1, operator="ggn"),
        ValueError,
        "eigenvalues: needs",
    ),
    "no examples": (
        lambda: sharpness.trace(quadratic_loss, W, operator="empirical_fisher"),
        ValueError,
        "trace: needs the losses of examples",
    ),
    "fisher": (
        lambda: sharpness.trace(of_losses(), W, operator="fisher"),
        ValueError,
        "`operator`",
    ),
    "k": (lambda: sharpness.eigenvalues(quadratic_loss, W, k=4), ValueError, "at most 3"),
    "k of zero": (lambda: sharpness.eigenvalues(quadratic_loss, W, k=0), ValueError, "`k`"),
    "iterations": (
        lambda: sharpness.eigenvalues(quadratic_loss, W, k=3, iterations=2),
        ValueError,
        "`iterations`",
    ),
    "which": (
        lambda: sharpness.eigenvalues(quadratic_loss, W, k=1, which="max"),
        ValueError,
        "`which`",
    ),
    "which end": (
        lambda: sharpness.extreme_eigenvalue(quadratic_loss, W, which=1),
        ValueError,
        "`which`",
    ),
    "a key": (lambda: sharpness.trace(quadratic_loss, W, key="a"), TypeError, "`key`"),
    "one draw": (lambda: sharpness.trace(quadratic_loss, W, draws=1), ValueError, "`draws`"),
    "draws": (
        lambda: sharpness.trace(quadratic_loss, W, draws=np.ones((4, 2))),
        ValueError,
        "`draws`",
    ),
    "one given draw": (
        lambda: sharpness.trace(quadratic_loss, W, draws=np.ones((1, 3))),
        ValueError,
        "`draws`",
    ),
    "a number of draws": (
        lambda: sharpness.trace(quadratic_loss, W, draws=2.5),
        TypeError,
        "`draws`",
    ),
    "sigma": (
        lambda: sharpness.density(quadratic_loss, W, np.ones(3), sigma=0.0),
        ValueError,
        "`sigma`",
    ),
    "grid": (
        lambda: sharpness.density(quadratic_loss, W, np.ones((3, 1)), sigma=1.0),
        ValueError,
        "`grid`",
    ),
    "grid of text": (
        lambda: sharpness.density(quadratic_loss, W, "abc", sigma=1.0),
        TypeError,
        "`grid`",
    ),
    "count": (lambda: sharpness.moments(quadratic_loss, W, count=0), ValueError, "`count`"),
    "logits loss": (
        lambda: two_parts(loss_on_logits=lambda z, x: z.mean())(W),
        ValueError,
        "`loss_on_logits` must return one loss per example",
    ),
}


def two_parts(**changes):
    parts = {"apply_fn": lambda w, x: x @ w, "loss_on_logits": lambda z, x: z**2, "batch": BATCH}
    return sharpness.objective(**parts | changes)


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input(what):
    call, error, message = WRONG[what]
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_two_parts_are_a_losses_fn():
    """Every variant that takes `losses_fn` takes its two parts, with the same result."""
    data, params = problem.make()
    batch, weights = problem.batch_at(data, 0), jnp.arange(16.0)
    parts = {
        "apply_fn": lambda w, b: (problem.logits_of(w, b), jnp.ones(())),
        "loss_on_logits": lambda z, b: problem.cross_entropy(z, b["y"]),
    }
    for tx in (samx.sam(0.1), samx.msam(0.1, 4), samx.accumulate(samx.sam(0.1), 4)):

        @jax.jit
        def both(params, batch, weights, tx=tx):
            update = functools.partial(tx.update, params, tx.init(params), params, batch=batch)
            found, _ = update(weights=weights, **parts)
            wanted, _ = update(weights=weights, losses_fn=problem.losses_fn)
            return found, wanted

        found, wanted = both(params, batch, weights)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), found, wanted)


def test_normalized_logits():
    """The scale of the last layer does not matter; equal logits have a zero gradient."""
    normalized = sharpness.normalize_logits(net_loss())
    f = jax.jit(lambda w: normalized(w))
    wanted = REFERENCE["net/logit_normalized/loss"]
    params = net_params()
    for scale in (1, 50):
        scaled = params | {name: scale * params[name] for name in ("W2", "b2")}
        np.testing.assert_allclose(f(scaled), wanted, rtol=1e-10)
    flat = jax.grad(f)(params | {name: 0 * params[name] for name in ("W2", "b2")})
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(flat))
    with pytest.raises(ValueError, match="normalize_logits: needs the logits"):
        sharpness.normalize_logits(quadratic_loss)


def test_half_of_the_parts_names_the_other():
    _, params = problem.make("float32")
    tx = samx.closure_transformation(
        lambda params: (), lambda g, s, p, *, loss_on_logits, apply_fn: (g, s), name="mine"
    )
    with pytest.raises(ValueError, match=r"mine: `apply_fn` is missing.*loss_on_logits=losses"):
        tx.update(params, (), params, loss_on_logits=problem.cross_entropy)
    with pytest.raises(TypeError, match="`apply_fn` must be a function"):
        tx.update(params, (), params, apply_fn=3)
    update = optax.with_extra_args_support(tx).update
    assert update(params, (), params, apply_fn=problem.logits_of, loss_on_logits=losses)
