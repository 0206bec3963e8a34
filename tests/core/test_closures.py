"""What closures see: dtypes, keywords for the base, and one objective."""

import functools

import jax
import jax.numpy as jnp
import optax
import problem
import pytest
from cases import CLOSURES, VARIANTS

import samx
from samx.perturbations import magnitude

BATCH = problem.batch_at(problem.make("float32")[0], 0)


def test_dtype_failure_at_the_perturbed_point_names_the_way_out():
    w = jnp.ones(3, jnp.bfloat16)

    def strict(p):
        return jax.lax.dot(p, jnp.ones(3, jnp.bfloat16)).astype(jnp.float32) + jax.lax.add(
            p, jnp.ones(3, jnp.bfloat16)
        ).sum().astype(jnp.float32)

    def updates_of(tx, w, value_fn):
        return jax.eval_shape(lambda: tx.update(w, tx.init(w), w, value_fn=value_fn)[0])

    with pytest.raises(TypeError, match="perturb_dtype=None"):
        updates_of(samx.sam(0.5), w, strict)
    assert updates_of(samx.sam(0.5, perturb_dtype=None), w, strict).dtype == jnp.bfloat16

    def broken(p):
        raise TypeError("not a matter of precision")

    with pytest.raises(TypeError, match="not a matter of precision"):
        updates_of(samx.sam(), jnp.ones(3), broken)


def test_opting_out_of_float32_is_visible_in_the_readings():
    w = jnp.full(1000, 100.0, jnp.bfloat16)
    norms, rises = {}, {}
    for dtype in (jnp.float32, None):
        tx = samx.all_readings(samx.sam(0.05, perturb_dtype=dtype))

        def update(w, state, update=tx.update):
            def loss(w):
                return (w - 100).sum().astype(jnp.float32)

            return update(jnp.ones_like(w), state, w, value=loss(w), value_fn=loss)

        _, state = jax.jit(update)(w, tx.init(w))
        norms[dtype] = float(optax.tree.get(state, "perturbation_norm"))
        rises[dtype] = float(optax.tree.get(state, "sharpness"))
    assert norms[jnp.float32] == pytest.approx(0.05, rel=1e-2)
    assert rises[jnp.float32] == pytest.approx(0.05 * 1000**0.5, rel=1e-2)
    assert norms[None] == rises[None] == 0.0


def test_with_base_hides_samx_keywords():
    seen = []

    def update_fn(updates, state, params=None, **keywords):
        seen.append((set(keywords), jnp.shape(keywords["value_fn"](params))))
        return updates, state

    base = optax.GradientTransformationExtraArgs(lambda params: (), update_fn)
    _, params = problem.make("float32")
    closure = {"value_fn": lambda p: (problem.losses_fn(p, BATCH).mean(), "aux")}
    given = {"losses_fn": problem.losses_fn, "batch": BATCH, "index": jnp.arange(16), "mine": 1}
    for tx in (samx.with_base(samx.sam(), base), samx.sampa(base, batch_like=BATCH)):
        seen.clear()
        update = functools.partial(tx.update, value=1.0, **closure, **given)
        jax.eval_shape(update, params, tx.init(params), params)
        assert seen
        assert all(one == ({"value", "value_fn", "mine"}, ()) for one in seen)


def test_magnitude_scales_by_name():
    metric = magnitude(0.5)
    params = {"kernel": jnp.zeros(1), "bias": jnp.zeros(1), "in_bias": jnp.zeros(1)}
    scales = metric(params | {"count": jnp.arange(2)})
    assert float(scales["kernel"][0]) == 0.5
    assert (scales["bias"], scales["in_bias"], scales["count"]) == (1.0, 1.0, 1.0)


NO_LOSS = {  # what a closure may return by mistake, and how the message calls it
    "nothing": (lambda loss: None, "nothing"),
    "three": (lambda loss: (loss, 1, 2), "a tuple of 3"),
    "one in a tuple": (lambda loss: (loss,), "a tuple of 1"),
    "a list": (lambda loss: [loss], "a list"),
    "a dict": (lambda loss: {"loss": loss}, "a dict"),
    "a text": (lambda loss: "loss", "a str"),
    "the aux first": (lambda loss: ({"acc": loss}, loss), "a dict"),
    "nothing and an aux": (lambda loss: (None, loss), "nothing"),
}


@pytest.mark.parametrize("what", NO_LOSS)
@pytest.mark.parametrize("name", CLOSURES)
def test_what_is_no_loss_is_refused_by_name(name, what):
    """In every closure that a variant takes, while tracing."""
    (broken, kind), (_, params) = NO_LOSS[what], problem.make("float32")
    tx = VARIANTS[name].build()
    state = jax.eval_shape(tx.init, params)
    closures = {"value_fn": lambda p: problem.losses_fn(p, BATCH).mean(), "batch": BATCH}
    closures |= {"losses_fn": problem.losses_fn} | problem.further(BATCH)
    functions = {"value_fn", "losses_fn", "ascent_fn", "training_fn", "validation_fn"}
    for keyword in functions & {*VARIANTS[name].needs}:
        right = closures[keyword]
        wrong = closures | {keyword: lambda *args, right=right: broken(right(*args))}
        with pytest.raises(TypeError, match=rf"`{keyword}` must return .*, got {kind}"):
            jax.eval_shape(functools.partial(tx.update, **wrong), params, state, params)


def test_losses_on_logits_have_no_aux():
    """The message does not offer one."""
    _, params = problem.make("float32")
    tx = samx.msam(num_microbatches=2)
    for result, got in ((lambda loss: None, "nothing"), (lambda loss: [loss], "a list")):
        closures = {
            "apply_fn": problem.logits_of,
            "loss_on_logits": lambda z, b, result=result: result(z.sum(1)),
        }
        with pytest.raises(
            TypeError, match=rf"`loss_on_logits` must return losses \[B\], got {got}"
        ):
            tx.update(params, tx.init(params), params, batch=BATCH, **closures)


@pytest.mark.parametrize("name", ["sampa", "msam", "ksam", "esam", "ausam", "fisher_sparse_sam"])
def test_an_empty_batch_is_refused(name):
    _, params = problem.make("float32")
    empty = jax.tree.map(lambda x: x[:0], BATCH)
    tx = VARIANTS[name].build()
    state = jax.eval_shape(tx.init, params)
    closures = {"losses_fn": problem.losses_fn, "batch": empty, **problem.further(empty)}
    with pytest.raises(ValueError, match="`batch` must hold at least one example"):
        jax.eval_shape(functools.partial(tx.update, **closures), params, state, params)


@jax.tree_util.register_pytree_node_class
class Box:
    """A container without structural equality, like those of Equinox."""

    def __init__(self, x):
        self.x = x

    def tree_flatten(self):
        return (self.x,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def with_box(params, batch):
    return problem.losses_fn(params, batch["box"].x), Box(batch["box"].x["x"].mean(0))


BOXES = {
    "sampa": lambda: samx.sampa(
        optax.sgd(0.1), batch_like={"box": Box(BATCH)}, aux_like=Box(jnp.zeros(10))
    ),
    "momentum_sam": lambda: samx.momentum_sam(
        optax.sgd(0.1, momentum=0.9), aux_like=Box(jnp.zeros(10))
    ),
    "msam": lambda: samx.msam(0.1, aux_like=Box(jnp.zeros(10))),
    "sl_sam": lambda: samx.sl_sam(optax.sgd(0.1), aux_like=Box(jnp.zeros(10))),
    "accumulate": lambda: samx.accumulate(samx.sam(), 2, aux_like=Box(jnp.zeros(10))),
}


@pytest.mark.parametrize("name", BOXES)
def test_containers_that_cannot_be_compared(name):
    tx, (_, params) = BOXES[name](), problem.make("float32")
    batch = {"box": Box(BATCH)}

    def value_fn(p):
        losses, aux = with_box(p, batch)
        return losses.mean(), aux

    closures = {"losses_fn": with_box, "batch": batch}
    closures |= {} if name == "accumulate" else {"value_fn": value_fn}
    update = functools.partial(tx.update, **closures)
    state = jax.eval_shape(tx.init, params)
    _, after = jax.eval_shape(update, params, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_an_aux_of_another_shape_or_structure():
    """A state keeps its containers; the paths, shapes and dtypes must be the same."""
    _, params = problem.make("float32")

    def update(aux_like, aux):
        tx = samx.momentum_sam(optax.sgd(0.1, momentum=0.9), aux_like=aux_like)
        state = jax.eval_shape(tx.init, params)
        keywords = {"value_fn": lambda p: (p["W1"].sum(), aux)}
        return jax.eval_shape(functools.partial(tx.update, **keywords), params, state, params)

    for wrong in ([jnp.zeros(3)], [jnp.zeros(2, int)], {"a": jnp.zeros(2)}, None, []):
        with pytest.raises(ValueError, match="`aux` must have the shapes and dtypes of `aux_like`"):
            update([jnp.zeros(2)], wrong)
    held = jax.tree.structure(update([jnp.zeros(2)], [jnp.zeros(2)]))
    assert jax.tree.structure(update([jnp.zeros(2)], (jnp.zeros(2),))) == held


@pytest.mark.parametrize("name", ["friendly_sam", "vsam", "ae_sam"])
def test_parameters_that_are_all_integers(name):
    """Nothing has a gradient, and nothing moves."""
    params, batch = {"W1": jnp.arange(3)}, {"x": jnp.ones((16, 3)), "y": BATCH["y"]}
    tx = optax.chain(VARIANTS[name].factory(), optax.scale(-1))
    update = functools.partial(tx.update, value_fn=lambda p: batch["x"].mean())
    updates, _ = jax.jit(update)(params, tx.init(params), params)
    assert updates["W1"].tolist() == [0, 0, 0]
