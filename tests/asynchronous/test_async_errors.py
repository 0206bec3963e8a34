"""Wrong use of `role_axis` and `pipelined` gets an error that says why."""

import jax
import optax
import problem
import pytest
import regimes
from async_runs import batches, loss, make_step
from jax.sharding import PartitionSpec as P

import samx
from samx.asynchronous import pipelined

pytestmark = pytest.mark.usefixtures("float64")


def test_the_role_axis_must_be_mapped_and_have_size_2():
    params, (pair,) = problem.make()[1], batches(4, steps=1)
    tx = optax.chain(samx.async_sam(0.1, role_axis="role"), optax.sgd(0.1))
    step, state = make_step(tx), tx.init(params)
    with pytest.raises(ValueError, match=r"async_sam: `role_axis`.*'role'.*not mapped.*shard_map"):
        jax.eval_shape(step, params, state, *pair)
    mesh = regimes.mesh_of((4,), ("role",))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match=r"'role' of `role_axis` must have size 2, got 4"):
        jax.eval_shape(mapped, params, state, *pair)


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (samx.sam(), "must hold one state of async_sam, found 0"),
        (optax.chain(samx.async_sam(), samx.async_sam()), "one state of async_sam, found 2"),
        (
            samx.perturb_if(samx.policies.every(2), samx.async_sam()),
            "async_sam is inside another transformation of samx.*one step old",
        ),
    ],
)
def test_two_devices_need_one_async_sam_in_a_chain(tx, message):
    params, device = problem.make()[1], jax.devices()[0]
    with pytest.raises(ValueError, match=f"pipelined: .*{message}"):
        pipelined(
            lambda *args: args[:3],
            jax.grad(loss),
            params,
            tx.init(params),
            [],
            descent_device=device,
            ascent_device=device,
        )
