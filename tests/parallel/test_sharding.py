"""Sharded parameters need nothing from samx under `jax.jit`, and every step lowers for a TPU."""

import jax
import jax.export
import numpy as np
import optax
import problem
import pytest
import regimes
from cases import CLOSURES, KINDS, VARIANTS
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from regimes import batches, on_one_device

import samx

# Parameters are sharded over the data axis and gathered in the loss (FSDP), or sharded over a model
# axis, where the loss computes with shards (tensor parallelism).
LAYOUTS = {
    "fully sharded": (
        (8,),
        ("data",),
        {"W1": P(None, "data"), "b1": P("data"), "W2": P("data"), "b2": P()},
    ),
    "tensor parallel": (
        (2, 4),
        ("data", "model"),
        {"W1": P(None, "model"), "b1": P("model"), "W2": P("model"), "b2": P()},
    ),
}


# Rows that draw, sort or take matrices apart, or keep a filter's sum.
MORE = ("bsam", "lpf_sgd", "rwp", "arwp", "marwp", "eigen_sam", "zsharp", "spectral_sam", "gcsam")
MORE += ("xsam", "x_sam", "lookbehind_sam", "tsam", "sam_polyak", "sassha", "gam", "gam_exact")


def logits_of(params, batch):
    """The logits of the tiny problem; on an Explicit mesh they specify the output sharding."""
    return head_on(params, features_of(params, batch))


def features_of(params, batch):
    params = whole(params)
    return jax.nn.tanh(batch["x"] @ params["W1"] + params["b1"][None])


def head_on(params, features):
    params, out = whole(params), P("data", None) if is_explicit("data") else None
    return jax.numpy.dot(features, params["W2"], out_sharding=out) + params["b2"][None]


def whole(params):
    if is_explicit("data") and not is_explicit("model"):
        return jax.tree.map(lambda w: jax.sharding.reshard(w, P()), params)
    return params


def losses_fn(params, batch):
    return problem.cross_entropy(logits_of(params, batch), batch["y"])


losses_fn.logits_of, losses_fn.features_of, losses_fn.head_on = logits_of, features_of, head_on


def is_explicit(axis):
    mesh = jax.sharding.get_abstract_mesh()
    return AxisType.Explicit == dict(zip(mesh.axis_names, mesh.axis_types, strict=True)).get(axis)


@pytest.mark.parametrize(
    ("name", "axis_type", "layout"),
    [
        (name, axis_type, layout)
        for name in CLOSURES
        for axis_type in (AxisType.Auto, AxisType.Explicit)
        for layout in LAYOUTS
        # The first row in all combinations; the others with Explicit types, in alternating layouts.
        if name == CLOSURES[0]
        or (axis_type == AxisType.Explicit and layout == list(LAYOUTS)[CLOSURES.index(name) % 2])
    ]
    + [
        pytest.param(name, axis_type, layout, marks=pytest.mark.slow)
        for name in MORE
        if name not in CLOSURES
        for axis_type in (AxisType.Auto, AxisType.Explicit)
        for layout in LAYOUTS
    ],
)
def test_sharded_parameters(name, axis_type, layout, float64):
    shape, names, specs = LAYOUTS[layout]
    _, params = problem.make()
    expected = on_one_device(name)
    mesh = regimes.mesh_of(shape, names, axis_type)
    with jax.set_mesh(mesh):
        params, data = regimes.place(params, mesh, specs), regimes.place(batches(), mesh, P("data"))
        tx = VARIANTS[name].build(batch_like=like(data[0][0]))
        step, state = jax.jit(regimes.make_step(tx, losses_fn)), tx.init(params)
        layouts = samx.state_specs(tx, params, batch_specs=P("data"), param_specs=specs)
        check_layout(state, layouts, mesh)
        history = regimes.run(step, params, state, data)
    for found, wanted in zip(history, expected, strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
            *map(problem.as_numbers, (found, wanted)),
        )
    check_layout(history[-1][0], specs, mesh)
    check_layout(history[-1][1], layouts, mesh)


TRACED = [name for name in dict.fromkeys([*KINDS, *MORE]) if name not in CLOSURES]


@pytest.mark.parametrize("name", TRACED)
def test_explicit_types_keep_the_layout(name, float64):
    """JAX decides Explicit layouts, and raises where it cannot, as it traces."""
    shape, names, specs = LAYOUTS[list(LAYOUTS)[TRACED.index(name) % 2]]
    mesh = regimes.mesh_of(shape, names, AxisType.Explicit)
    with jax.set_mesh(mesh):
        params, batch = regimes.place(
            (problem.make()[1], batches(1)[0][0]), mesh, (specs, P("data"))
        )
        tx = VARIANTS[name].build(batch_like=like(batch))
        state = jax.eval_shape(tx.init, params)
        layouts = samx.state_specs(tx, params, batch_specs=P("data"), param_specs=specs)
        found = jax.eval_shape(regimes.make_step(tx, losses_fn), params, state, batch)

    def same(leaf, spec):
        return leaf.sharding.spec == P(*spec, *[None] * (leaf.ndim - len(spec)))

    def check(leaf, spec):
        replicated = leaf.sharding is None  # where JAX leaves it to the mesh
        assert spec == P() if replicated else same(leaf, spec), (leaf, spec)

    jax.tree.map(check, found[:2], (specs, layouts))


@pytest.mark.parametrize("pattern", ["structured", (2, 4)])
def test_patterns_of_a_mask_over_sharded_parameters(pattern, float64):
    """Entries of one pattern may be on two devices."""
    shape, names, specs = LAYOUTS["fully sharded"]
    data, params = problem.make()
    params, batch = params | {"table": np.arange(8)}, problem.batch_at(data, 0)
    ball = samx.perturbations.fisher_mask(
        samx.perturbations.metric_ball(0.1), period=1, pattern=pattern, num_microbatches=2
    )

    @jax.jit
    def mask_of(params, batch):
        state = ball.init(params)._replace(step=jax.numpy.ones((), np.int32))
        _, state = ball.update(params, state, params, losses_fn=losses_fn, batch=batch)
        return state.mask

    expected = mask_of(params, batch)
    assert not expected["table"].any()
    mesh = regimes.mesh_of(shape, names, AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = regimes.place(params, mesh, specs | {"table": P("data")})
        found = mask_of(params, regimes.place(batch, mesh, P("data")))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    check_layout(found, specs | {"table": P("data")}, mesh)


def test_a_pair_of_groups_with_tensor_parallel_parameters(float64):
    """Three axes: SAMPa's two groups, the data, the model."""
    _, _, specs = LAYOUTS["tensor parallel"]
    _, params = problem.make()
    mesh = regimes.mesh_of((2, 2, 2), ("pair", "data", "model"), AxisType.Explicit)
    with jax.set_mesh(mesh):
        params, data = regimes.place(params, mesh, specs), regimes.place(batches(), mesh, P("data"))
        tx = VARIANTS["sampa"].build(batch_like=like(data[0][0]), pair_sharding=P("pair"))
        step = jax.jit(regimes.make_step(tx, losses_fn))
        history = regimes.run(step, params, tx.init(params), data)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
        history,
        on_one_device("sampa"),
    )
    check_layout(history[-1][0], specs, mesh)


def like(batch):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch
    )


def check_layout(tree, specs, mesh):
    def check(leaf, spec):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim), (leaf, spec)

    jax.tree.map(check, tree, specs)


def test_state_specs_lay_out_a_compiled_init():
    """Without `out_shardings`, the compiler chooses where the zeros of a compiled `init` are."""
    _, params = problem.make("float32")
    shape, names, specs = LAYOUTS["tensor parallel"]
    mesh = regimes.mesh_of(shape, names)
    tx = optax.chain(samx.sam(0.05), optax.adam(1e-3))
    layout = samx.state_specs(tx, params, param_specs=specs)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), layout)
    state = jax.jit(tx.init, out_shardings=shardings)(regimes.place(params, mesh, specs))
    check_layout(optax.tree.get(state, "mu"), specs, mesh)
    check_layout(optax.tree.get(state, "nu"), specs, mesh)
    check_layout(optax.tree.get(state, "readings").loss, P(), mesh)


def test_state_specs_of_held_examples_and_factored_moments():
    params = {"w": jax.ShapeDtypeStruct((256, 128), np.float32)}
    batch = {
        "x": jax.ShapeDtypeStruct((8, 4), np.float32),
        "y": jax.ShapeDtypeStruct((8,), np.int32),
    }
    specs = samx.state_specs(
        samx.sampa(optax.adafactor(1e-3), batch_like=batch),
        params,
        batch_specs={"x": P("data", "model"), "y": P("data")},
        param_specs={"w": P("model", None)},
    )
    assert specs.previous == samx.HeldBatch({"x": P("data", "model"), "y": P("data")}, P("data"))
    assert specs.g_y == {"w": P("model", None)}
    assert optax.tree.get(specs, "v_row") == {"w": P()}  # its parameter has another shape
    assert specs.readings.loss == specs.step == P()


@pytest.mark.parametrize("argument", ["batch_specs", "param_specs"])
def test_state_specs_that_do_not_match(argument):
    _, params = problem.make("float32")
    tx = samx.sampa(optax.sgd(0.1), batch_like={"x": params["W1"], "y": params["W1"]})
    with pytest.raises(ValueError, match=f"`{argument}` must be one PartitionSpec or a tree"):
        samx.state_specs(tx, params, **{argument: {"other": P()}})


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("sam", "sampa", "looksam", "esam", "ausam", "sl_sam", "fisher_sparse_sam"),
        *("bsam", "arwp", "eigen_sam", "spectral_sam", "xsam", "lookbehind_sam", "tsam", "sassha"),
    ],
)
def test_every_step_lowers_for_every_platform(name):
    """As users call it: `jit` on one device, and `shard_map` over two."""
    data, params = problem.make("float32")
    batch = problem.batch_at(data, 0)
    tx = VARIANTS[name].build(batch_like=batch)
    mesh, parallel = regimes.mesh_of((2,)), samx.data_parallel(tx, "data")
    specs = samx.state_specs(parallel, params, batch_specs=P("data"))
    mapped = jax.shard_map(
        regimes.make_step(parallel, axes="data"),
        mesh=mesh,
        in_specs=(P(), specs, P("data")),
        out_specs=(P(), specs, P()),
    )
    for step in (regimes.make_step(tx), mapped):
        exported = jax.export.export(jax.jit(step), platforms=("cpu", "cuda", "tpu"))(
            params, tx.init(params), batch
        )
        assert exported.platforms == ("cpu", "cuda", "tpu")
    arguments = regimes.place((params, tx.init(params)), mesh, (P(), specs))
    found = jax.jit(exported.call)(*arguments, regimes.place(batch, mesh, P("data")))
    expected = jax.jit(regimes.make_step(tx))(params, tx.init(params), batch)
    for pair in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(*problem.as_numbers(pair), rtol=1e-5, atol=1e-6)
