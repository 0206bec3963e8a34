"""Convolutions inside branches and loops: the same numbers, in the layout that is fast."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import samx
from samx import fast_convolutions

FAST = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"
AXES = {1: "H", 2: "HW", 3: "HWD"}
SIZES = {1: (9,), 2: (7, 8), 3: (4, 5, 6)}

KINDS = {
    "plain": {},
    "strides": {"window_strides": (2, 3)},
    "valid": {"padding": "VALID", "window_strides": (2, 1)},
    "lhs_dilation": {"lhs_dilation": (2, 3), "padding": ((1, 1), (0, 2))},
    "rhs_dilation": {"rhs_dilation": (2, 1)},
    "padding": {"padding": ((2, 0), (0, 3))},
    "negative padding": {"padding": ((-1, 0), (2, -1))},
    "transposed": {"lhs_dilation": (2, 2), "padding": ((2, 1), (1, 2)), "rhs_dilation": (1, 2)},
    "NCHW": {"numbers": ("NCHW", "OIHW", "NCHW")},
    "CWHN": {"numbers": ("CWHN", "IOHW", "WHNC"), "window_strides": (1, 2)},
    "groups": {"groups": 2},
    "NCHW groups": {"groups": 2, "numbers": ("NCHW", "OIHW", "NCHW")},
    "depthwise": {"groups": 4},
    "batch groups": {"batch_groups": 2},
    "1d": {"rank": 1},
    "3d": {"rank": 3, "window_strides": (1, 2, 1)},
    "bfloat16": {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32},
    "complex64": {"dtype": jnp.complex64},
    "precision": {"precision": "highest"},
}
# The kernel's gradient of a grouped convolution stays as it is, and XLA changes it outside of
# branches: those numbers may differ in the last bit.
GROUPED = ("groups", "NCHW groups", "batch groups")


def make(rank=2, groups=1, batch_groups=1, numbers=None, dtype=jnp.float32, **keywords):
    """Return a function for the result and both gradients of a convolution, and its arguments."""
    space = AXES[rank]
    numbers = numbers or ("N" + space + "C", space + "IO", "N" + space + "C")
    sizes = dict(zip(space, SIZES[rank], strict=True))
    image = {"N": 6, "C": 4, **sizes}
    kernel = {"I": 4 // groups, "O": 4, **dict.fromkeys(space, 3)}
    rng = np.random.default_rng(0)

    def draw(shape):
        x = rng.normal(size=shape)
        return jnp.asarray(x + 1j * rng.normal(size=shape) if dtype == jnp.complex64 else x, dtype)

    def conv(x, w):
        defaults = {"window_strides": (1,) * rank, "padding": "SAME", "dimension_numbers": numbers}
        count = {"feature_group_count": groups, "batch_group_count": batch_groups}
        return jax.lax.conv_general_dilated(x, w, **(defaults | count | keywords))

    def both(x, w, cotangent):
        y, vjp = jax.vjp(conv, x, w)
        return y, *vjp(cotangent)

    x, w = draw([image[axis] for axis in numbers[0]]), draw([kernel[axis] for axis in numbers[1]])
    out = jax.eval_shape(conv, x, w)
    return both, (x, w, draw(out.shape).astype(out.dtype))


def inside(fn, is_taken, *args):
    """Call the function in a branch, which is taken."""
    shapes = jax.eval_shape(fn, *args)
    zeros = lambda *_: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)  # noqa: E731
    return jax.lax.cond(is_taken, fn, zeros, *args)


@pytest.fixture(scope="module")
def results():
    """The results of all kinds: from one program without branches, and from one with them."""
    kinds = {name: make(**kind) for name, kind in KINDS.items()}
    args = {name: args for name, (_, args) in kinds.items()}

    @jax.jit
    def outside(args):
        return {name: kinds[name][0](*xs) for name, xs in args.items()}

    @jax.jit
    @fast_convolutions
    def branches(is_taken, args):
        return {name: inside(kinds[name][0], is_taken, *xs) for name, xs in args.items()}

    return outside(args), branches(True, args)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_outside_of_branches(results, kind):
    for part, expected, got in zip(["y", "x", "w"], *(r[kind] for r in results), strict=True):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        if kind in GROUPED and (part == "w" or kind == "batch groups"):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(np.asarray(got), np.asarray(expected), err_msg=part)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "batch groups"])
def test_every_kind_is_rewritten(kind):
    """All but batch groups of several features: no layout but one."""
    fn, args = make(**KINDS[kind])
    labels = layouts(jax.jit(fast_convolutions(fn)).lower(*args))
    groups = kind in GROUPED
    assert len(set(labels)) == 1 + groups
    assert len(labels) >= 3


def layouts(lowered):
    return re.findall(r"dim_numbers = (\S.*?->\[.*?\])", lowered.as_text())


# Small integers: sums are exact in any order.
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.integers(-3, 4, (8, 6, 6, 3)), jnp.float32)
W = jnp.asarray(RNG.integers(-3, 4, (3, 3, 3, 4)), jnp.float32)


def loss(w, x=X):
    y = jax.lax.conv_general_dilated(
        *(x, w, (1, 1), "SAME"), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.sum(y**2) / 2


grad = jax.grad(loss)


def signs(w):
    return jnp.sign(grad(w))


def with_custom_jvp(w):
    fn = jax.custom_jvp(grad)
    fn.defjvp(lambda primals, tangents: (fn(*primals), tangents[0]))
    return fn(w)


def with_custom_vjp(w):
    fn = jax.custom_vjp(grad)
    fn.defvjp(lambda w: (fn(w), None), lambda _, cotangent: (cotangent,))
    return fn(w)


def with_linear_solve(w):
    def solve(_, b):
        return b / 2 + 0 * signs(w)

    return jax.lax.custom_linear_solve(lambda v: 2 * v, w, solve, symmetric=True)


def with_a_reference(w):
    ref = jax.new_ref(w)

    def body(_, __):
        ref[...] = signs(ref[...])
        return None, None

    jax.lax.scan(body, None, length=2)
    return ref[...]


def sharded(w, check_vma):
    """A mean over devices."""

    def local(w, x):
        if check_vma:
            w = jax.lax.pcast(w, "data", to="varying")
        return jax.lax.psum(grad(w, x), "data")

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P("data")), "out_specs": P()}
    return jax.shard_map(local, mesh=mesh, check_vma=check_vma, **specs)(w, X)


NESTED = {
    "nothing": grad,
    "cond": lambda w: jax.lax.cond(w[0, 0, 0, 0] > -9, grad, lambda w: w, w),
    "switch": lambda w: jax.lax.switch(
        w[0, 0, 0, 0].astype(int) * 0 + 1, [lambda w: w, grad, signs], w
    ),
    "scan": lambda w: jax.lax.scan(lambda w, _: (signs(w), None), w, length=2)[0],
    "while_loop": lambda w: jax.lax.while_loop(
        lambda c: c[0] < 2, lambda c: (c[0] + 1, signs(c[1])), (0, w)
    )[1],
    "fori_loop": lambda w: jax.lax.fori_loop(0, 2, lambda _, w: signs(w), w),
    "map": lambda w: jax.lax.map(lambda x: grad(w, x[None]), X),
    "branch in a loop": lambda w: jax.lax.fori_loop(
        0, 2, lambda i, w: jax.lax.cond(i == 0, signs, lambda w: w, w), w
    ),
    "remat": lambda w: jax.grad(jax.checkpoint(loss))(w),
    "jit": lambda w: jax.jit(grad)(w),
    "vmap": lambda w: jax.vmap(lambda x: grad(w, x[None]))(X),
    "custom_jvp": with_custom_jvp,
    "custom_vjp": with_custom_vjp,
    "custom_linear_solve": with_linear_solve,
    "reference": with_a_reference,
    "shard_map": lambda w: sharded(w, check_vma=True),
    "shard_map, unchecked": lambda w: sharded(w, check_vma=False),
}


@pytest.fixture(scope="module")
def nested():
    def all_of_them(w):
        return {name: fn(w) for name, fn in NESTED.items()}

    return jax.jit(all_of_them)(W), jax.jit(fast_convolutions(all_of_them))(W)


@pytest.mark.parametrize("name", NESTED)
def test_nested_jaxprs(nested, name):
    np.testing.assert_array_equal(*(results[name] for results in nested))
    before = layouts(jax.jit(NESTED[name]).lower(W))
    assert any(layout != FAST for layout in before)
    after = layouts(jax.jit(fast_convolutions(NESTED[name])).lower(W))
    assert after == [FAST] * len(before)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_get_the_program_as_it_was(platform):
    def program(fn):
        return jax.jit(fn).trace(W).lower(lowering_platforms=(platform,))

    before, after = program(NESTED["scan"]), program(fast_convolutions(NESTED["scan"]))
    assert layouts(before) == layouts(after)
    transposes = [program.as_text().count("stablehlo.transpose") for program in (before, after)]
    assert transposes[0] == transposes[1]


def test_a_program_without_convolutions_is_traced_once_and_stays_as_it_is():
    traces = []

    def fn(w):
        traces.append(w)
        return jax.lax.cond(True, lambda: jax.lax.map(jax.nn.relu, w), lambda: w), None

    expected = jax.make_jaxpr(fn)(W)
    assert str(jax.make_jaxpr(fast_convolutions(fn))(W)) == str(expected)
    assert len(traces) == 2


def test_results_that_are_no_arrays_stay_as_they_are():
    result = fast_convolutions(lambda w, name: {"w": w, "name": name, "size": w.size})(W, name="x")
    assert (result["name"], result["size"]) == ("x", W.size)
    with pytest.raises(TypeError, match="`fn` must be a function, got 3"):
        fast_convolutions(3)


def test_what_is_shared_stays_shared():
    """A layer that a model calls twice is one function of the program."""
    layer = jax.jit(grad)
    text = jax.jit(fast_convolutions(lambda w: layer(layer(w)))).lower(W).as_text()
    assert text.count("stablehlo.convolution") == 2


def test_twice_is_once():
    """The inner one has done the work, here in a loop of samx inside a loop of the user."""
    once, twice = fast_convolutions(grad), fast_convolutions(fast_convolutions(grad))
    text = str(jax.make_jaxpr(once)(W))
    assert str(jax.make_jaxpr(twice)(W)) == text
    assert text.count("platform_index") == 1


def test_effects():
    seen = []

    @jax.jit
    @fast_convolutions
    def fn(w):
        def body(w, i):
            jax.debug.callback(lambda i: seen.append(int(i)), i, ordered=True)
            return signs(w), None

        return jax.lax.scan(body, w, jnp.arange(3))[0]

    fn(W)
    jax.effects_barrier()
    assert seen == [0, 1, 2]


def test_transformations():
    """A rewritten function is mapped and differentiated like any other."""

    def fn(w):
        return jnp.sum(jax.lax.cond(True, grad, lambda w: w, w) * W)

    def everything(fn):
        ws = jnp.stack([W, 2 * W])
        return {
            "vmap": jax.vmap(fn)(ws),
            "grad": jax.grad(fn)(W),
            "jvp": jax.jvp(fn, (W,), (W,)),
            "grad of grad": jax.grad(lambda w: jnp.sum(jax.grad(lambda v: fn(v) ** 2 / 2)(w)))(W),
            "mapped collective": jax.vmap(lambda w: jax.lax.psum(fn(w), "runs"), axis_name="runs")(
                ws
            ),
        }

    expected, got = jax.jit(lambda: (everything(fn), everything(fast_convolutions(fn))))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), expected, got)


@pytest.mark.parametrize("kind", ["Auto", "Explicit", "auto_axes"])
def test_shardings(kind):
    """The batch, sharded, is the third axis of the images. Inside `auto_axes` the mesh is Auto."""
    axis_type = AxisType.Auto if kind == "Auto" else AxisType.Explicit
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    specs = {"x": P(None, None, "data"), "w": P()}
    arrays = {"x": jnp.moveaxis(X, 0, 2), "w": W}
    arrays = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in arrays.items()}

    def loss(w, x):
        numbers = ("HWNC", "HWIO", "HWNC")
        y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)
        return jnp.sum(y**2) / 2

    grads = jax.grad(loss, argnums=(0, 1))
    if kind == "auto_axes":
        grads = jax.sharding.auto_axes(grads, out_sharding=(specs["w"], specs["x"]))

    def fn(w, x):
        return jax.lax.cond(True, grads, lambda w, x: (w, x), w, x)

    with jax.set_mesh(mesh):
        lowered = [jax.jit(f).lower(**arrays) for f in (fn, fast_convolutions(fn))]
        before, after = (f.compile() for f in lowered)
        outputs = zip(before(**arrays), after(**arrays), strict=True)
    assert set(layouts(lowered[1])) == {FAST}
    collectives = [re.findall(r"(all-\w+|collective-\w+)\(", f.as_text()) for f in (before, after)]
    assert collectives[0] == collectives[1]
    for expected, got in outputs:
        assert jax.typeof(got) == jax.typeof(expected)
        assert got.sharding.is_equivalent_to(expected.sharding, got.ndim)
        np.testing.assert_array_equal(got, expected)


def test_without_jit_the_function_sees_numbers():
    with jax.disable_jit():
        assert fast_convolutions(lambda w: float(jnp.sum(w)))(W) == float(jnp.sum(W))


def losses_fn(params, batch):
    y = jax.lax.conv_general_dilated(
        *(batch["x"], params["w"], (1, 1), "SAME"), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.mean(jnp.tanh(y) @ params["v"], axis=(1, 2))


SGD = optax.sgd(0.1)
BRANCHING = {
    "looksam": samx.looksam(0.05, period=5),
    "periodic": samx.perturb_if(samx.policies.every(5), samx.sam(0.05)),
    "ae_sam": samx.ae_sam(0.05),
    "vsam": samx.vsam(0.05),
    "ausam": samx.ausam(0.05, 0.5, num_examples=8, warmup_steps=1),
    "sl_sam": samx.sl_sam(SGD, 0.05),
    "several ascent steps": samx.sharpness_aware(
        samx.perturbations.metric_ball(0.05), ascent_steps=3
    ),
    "msam": samx.msam(0.05, num_microbatches=2),
    "accumulate": samx.accumulate(samx.sam(0.05), num_microbatches=2),
    "fisher_sparse_sam": samx.fisher_sparse_sam(0.05, 0.5, period=5),
    "async_sam": samx.async_sam(0.05, first="sam"),
}


@pytest.mark.parametrize("name", BRANCHING)
def test_every_convolution_of_a_step_is_fast(name):
    """XLA itself brings those outside of branches into the layout; the text is what it compiled."""
    tx, params = BRANCHING[name], {"w": W, "v": jnp.ones(4)}
    batch = {"x": X, "index": jnp.arange(8)}

    def step(params, state, batch):
        def value_fn(p):
            return losses_fn(p, batch).mean()

        value, g = jax.value_and_grad(value_fn)(params)
        keywords = {"losses_fn": losses_fn, "batch": batch, "index": batch["index"]}
        return tx.update(g, state, params, value=value, **keywords)

    text = jax.jit(step).lower(params, tx.init(params), batch).compile().as_text()
    labels = re.findall(r"dim_labels=([^\s,]+)", text)
    assert len(labels) >= 4
    assert set(labels) == {"b01f_01io->b01f"}
    assert " conditional(" in text or " while(" in text


def test_no_branch_of_samx_is_forgotten():
    """Where a branch or a loop calls a closure of the user, it is wrapped; these call none."""
    bare = {
        "core/draws.py": "random numbers",
        "core/tree.py": "norms out of range",
        "perturbations/dynamic_mask.py": "masks from gradients at hand",
        "perturbations/fisher_mask.py": "a loop inside a branch that is wrapped",
        "perturbations/top_entries.py": "bits of numbers",
        "elastic/_averaging.py": "an all-reduce",
        "sharpness/lanczos.py": "random vectors",
        "sharpness/worst_case.py": "a loop inside a loop that is wrapped",
    }
    call = re.compile(r"jax\.lax\.(cond|switch|scan|fori_loop|while_loop|map)\(")
    package = Path(samx.__file__).parent
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for line in path.read_text().splitlines()
        if call.search(line) and not line.strip().startswith((">>>", "..."))
    }
    assert found == set(bare)
