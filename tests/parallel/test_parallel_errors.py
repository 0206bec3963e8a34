"""Wrong use of `data_parallel`, `value_and_grad` and SAMPa's pair."""

import jax
import problem
import pytest
import regimes
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from regimes import PAIRED, as_batch, first_batch, mapped, mean_loss, sampa

import samx

pytestmark = pytest.mark.usefixtures("float64")


def trace_step(tx):
    params, batch = first_batch()
    return jax.eval_shape(
        lambda: tx.update(params, tx.init(params), params, losses_fn=problem.losses_fn, batch=batch)
    )


def test_an_axis_that_is_not_mapped():
    params, batch = first_batch()
    tx = samx.data_parallel(samx.sam(0.05), "data")
    with pytest.raises(ValueError, match=r"data_parallel: `axis_name` .* 'data' is not.*jax.jit"):
        trace_step(tx)
    with pytest.raises(ValueError, match=r"value_and_grad: `axis_name` .* 'data' is not"):
        samx.value_and_grad(mean_loss, "data")(params, batch)


def test_wrapped_twice():
    params, batch = first_batch()
    tx = samx.data_parallel(samx.data_parallel(samx.sam(0.05), "data"), "data")

    def fn(params, x, y):
        return tx.update(
            params, tx.init(params), params, losses_fn=problem.losses_fn, batch=as_batch(x, y)
        )[0]

    with pytest.raises(ValueError, match="inside another data_parallel"):
        mapped(fn, "shard_map", 2)(params, batch["x"], batch["y"])


def test_missing_closures_name_the_keyword():
    _, params = problem.make()
    tx = samx.data_parallel(samx.sam(0.05), "data")
    with pytest.raises(ValueError, match="data_parallel: `value_fn` is missing"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="data_parallel: `params` is missing"):
        tx.update(params, tx.init(params), None, value_fn=lambda p: 0.0)


@pytest.mark.parametrize("ascent", ["everywhere", "data", ("other",), ("data", "other")])
def test_unknown_ascent(ascent):
    with pytest.raises(ValueError, match=r"`ascent` must be 'global', 'local' or some of.*'data'"):
        samx.data_parallel(samx.sam(0.05), "data", ascent)


@pytest.mark.parametrize("axes", [None, 3, ("data", 1)])
def test_axes_are_names(axes):
    for make in (samx.data_parallel, samx.value_and_grad):
        with pytest.raises(TypeError, match=f"{make.__name__}: `axis_name` must be the name"):
            make(samx.sam(0.05), axes)
    with pytest.raises(TypeError, match="`ascent` must be the name"):
        samx.data_parallel(samx.sam(0.05), "data", 3)


def test_a_loss_that_is_no_scalar():
    params, batch = first_batch()

    def fn(params, x, y):
        return samx.value_and_grad(problem.losses_fn, "data")(params, as_batch(x, y))

    with pytest.raises(ValueError, match=r"`value_fn` must return a scalar.*\(2,\)"):
        mapped(fn, "shard_map", 2)(params, batch["x"], batch["y"])


@pytest.mark.parametrize(
    ("sharding", "error", "message"),
    [
        ("pair", TypeError, "must be a PartitionSpec or NamedSharding, got str"),
        (P(), ValueError, "must name one axis"),
        (P("pair", "data"), ValueError, "must name one axis"),
        (P(("pair", "data")), ValueError, "must name one axis"),
        (P(None), ValueError, "must name one axis"),
    ],
)
def test_pair_sharding_is_one_axis(sharding, error, message):
    with pytest.raises(error, match=f"sampa: `pair_sharding` {message}"):
        sampa(pair_sharding=sharding)(first_batch()[1])


def test_pair_sharding_is_one_call():
    with pytest.raises(ValueError, match=r"`pair_sharding`.*'vmap'"):
        sampa(pair_sharding=P("pair"), gradients="separate")(first_batch()[1])


def test_the_pair_axis_must_exist_and_have_size_2():
    params, batch = first_batch()
    tx = PAIRED(batch)
    with pytest.raises(ValueError, match=r"`pair_sharding` names the axis 'pair'.*set_mesh"):
        trace_step(tx)
    four = regimes.mesh_of((4,), ("pair",))
    named = sampa(pair_sharding=NamedSharding(four, P("pair")))(batch)
    with jax.set_mesh(regimes.mesh_of()), pytest.raises(ValueError, match=r"has the axes.*'data'"):
        trace_step(tx)
    for paired in (tx, named):
        with jax.set_mesh(four), pytest.raises(ValueError, match=r"'pair'.* size 2, got 4"):
            trace_step(paired)

    def fn(params, x, y):
        return tx.update(
            params, tx.init(params), params, losses_fn=problem.losses_fn, batch=as_batch(x, y)
        )[0]

    step = jax.shard_map(fn, mesh=four, in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match=r"'pair'.* size 2, got 4"):
        jax.eval_shape(step, params, batch["x"], batch["y"])
