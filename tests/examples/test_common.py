"""What the examples share: the registry, folders, arguments, reports, tuning, data and models."""

import argparse
import math

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import samx
from examples.claims import long_tail
from examples.common import arguments, choices, digits_task, models, training, vision
from examples.common.output import free_folder
from examples.common.registry import BASES, VARIANTS, Setting, check_base
from examples.common.report import Report, mean_and_error, without_nans
from examples.common.tuning import Runs, runs_of, scores_of
from examples.devices import data_parallel
from examples.train import cifar, kills


def test_free_folder_never_overwrites(in_empty_folder):
    first, second = free_folder(None, "digits"), free_folder(None, "digits")
    assert (first.name, second.name) == ("digits-001", "digits-002")
    assert free_folder("new/deep", "digits").is_dir()
    (in_empty_folder / "file").write_text("")
    with pytest.raises(ValueError, match="not a folder"):
        free_folder("file", "digits")


def test_command_lines_offer_what_there_is():
    assert choices.catalog() == [entry.name for entry in samx.catalog()]
    assert sorted(choices.VARIANTS) == sorted(VARIANTS)
    assert [*choices.BASES] == [*BASES]
    assert [*choices.BATCHES] == [*models.MODELS]
    assert [*cifar.BASES] == [*vision.MODELS]
    assert {*cifar.BASES.values()} == {*cifar.RATES}
    assert [*data_parallel.STRATEGIES] == [*data_parallel.TRAINERS]
    assert [*kills.NAMES] == [*kills.TARGETS]
    assert [*long_tail.NAMES] == [*long_tail.METHODS]


def test_registry_shows_what_a_base_lacks():
    for variant in VARIANTS:
        for base in BASES:
            if (variant, base) == ("momentum-sam", "sgd"):
                with pytest.raises(ValueError, match="must have one momentum"):
                    check_base(variant, base)
            else:
                check_base(variant, base)


def test_random_keys_of_all_variants_are_in_fields_of_one_name():
    """`training.with_own_draws` gives those of this name to each seed."""
    x = jax.ShapeDtypeStruct((2,), np.float32)
    setting, base = Setting(x, batch_size=1, num_examples=1), BASES["momentum"](0.1)
    names = []
    for variant in VARIANTS.values():
        state = jax.eval_shape(variant.make(0.1, base, setting).init, x)
        leaves = jax.tree_util.tree_leaves_with_path(state)
        names += [path[-1].name for path, leaf in leaves if leaf.dtype == np.uint32]
    assert {*names} == {"key"}


@pytest.mark.parametrize(("devices", "count"), [(1, 4), (8, 3), (24, 1)])
def test_registry_takes_microbatches_that_divide_the_examples_of_a_device(
    devices, count, monkeypatch
):
    taken = []
    monkeypatch.setattr(samx, "msam", lambda rho, count, **_: taken.append(count) or optax.sgd(0.1))
    setting = Setting(None, batch_size=120, num_examples=120, num_groups=devices)
    VARIANTS["msam"].make(0.1, optax.sgd(0.1), setting)
    assert taken == [count]


def parsed(**values):
    """Return the checks of these arguments, and a parser to give to them."""
    return argparse.ArgumentParser(), argparse.Namespace(**values)


def test_arguments_in_range_pass():
    parser, args = parsed(seeds=1, rho=[0.0, 0.2], none=None, noise=0.0, learning_rate=1e-3)
    arguments.check_range(parser, args, "seeds", "none")
    arguments.check_range(parser, args, "seeds", low=0, high=1)
    arguments.check_share(parser, args, "noise", "none")
    arguments.check_finite(parser, args, "rho", "none")
    arguments.check_finite(parser, args, "learning_rate", above_zero=True)


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (lambda *to: arguments.check_range(*to), 0, "must be at least 1, got 0"),
        (lambda *to: arguments.check_range(*to), [3, 0], "must be at least 1, got 0"),
        (lambda *to: arguments.check_range(*to, low=0, high=0.5), 1, "must be 0 to 0.5, got 1"),
        (lambda *to: arguments.check_range(*to), math.nan, "must be at least 1, got nan"),
        (lambda *to: arguments.check_share(*to), 1.0, "must be in [0, 1), got 1.0"),
        (lambda *to: arguments.check_share(*to), math.nan, "must be in [0, 1), got nan"),
        (
            lambda *to: arguments.check_finite(*to),
            [1, -0.1],
            "must be finite and at least 0",
        ),
        (
            lambda *to: arguments.check_finite(*to),
            math.inf,
            "must be finite and at least 0",
        ),
        (
            lambda *to: arguments.check_finite(*to, above_zero=True),
            0.0,
            "must be finite and above 0, got 0.0",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(check, value, message, capsys):
    with pytest.raises(SystemExit):
        check(*parsed(some_name=value), "some_name")
    assert f"--some-name {message}" in capsys.readouterr().err


def test_every_candidate_trains_with_every_seed():
    candidates = [(0.1, 1.0), (0.2, 2.0), (0.3, 3.0)]
    runs = Runs(*runs_of(range(7, 9), candidates))
    np.testing.assert_array_equal(runs.seed, [7, 8] * 3)
    np.testing.assert_allclose(runs.learning_rate, [0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    np.testing.assert_allclose(runs.rho, [1, 1, 2, 2, 3, 3])
    scores = scores_of(np.array([0.5, 0.7, 0.9, 0.1, 0.6, 0.65]), candidates)
    np.testing.assert_allclose(scores, [0.6, 0.5, 0.625])
    assert scores.argmax() == 2


def test_a_report_is_json_and_says_where_it_is(tmp_path, capsys, read_report):
    args = argparse.Namespace(folder=tmp_path, out=None, seeds=3, counts=[1])
    report = Report(args, left_out=["counts"])
    report.save(results=[{"a": math.nan, "b": (1.0, math.inf)}])
    report.end("plot.png")
    read = read_report(tmp_path)
    assert read["results"] == [{"a": None, "b": [1.0, None]}]
    assert read["settings"] == {"seeds": 3}
    assert (read["jax"], read["samx"]) == (jax.__version__, samx.__version__)
    printed = capsys.readouterr().out
    for text in (f"device: {read['device']}", "s in all", "results.json", "plot.png"):
        assert text in printed
    assert without_nans({"a": [1.0, math.inf]}) == {"a": [1.0, None]}


def test_mean_and_error():
    assert mean_and_error([1.0, 3.0]) == pytest.approx((2.0, 1.0))
    mean, error = mean_and_error([2.0])
    assert mean == 2
    assert math.isnan(error)


def test_flipped_labels_are_wrong_and_only_in_training():
    seed = np.array([3])
    clean, noisy = (
        [{k: v[0] for k, v in part.items()} for part in digits_task.split(seed, noise)]
        for noise in (0.0, 0.3)
    )
    assert int((clean[0]["y"] != noisy[0]["y"]).sum()) == 0.3 * digits_task.TRAIN
    for part in (1, 2):
        np.testing.assert_array_equal(clean[part]["y"], noisy[part]["y"])
    assert [len(part["y"]) for part in clean] == [digits_task.TRAIN, digits_task.VALIDATION, 500]


def test_the_time_of_a_step_is_that_of_the_whole_training_without_disturbances(monkeypatch):
    """On a fake clock: three blocks, of which another one is disturbed in each training."""
    times = [[90.0, 12.0, 3.0], [20.0, 12.0, 3.0]]
    ticks = iter(np.cumsum([[0.0, *blocks] for blocks in times]))
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(training, "blocks", lambda *args: iter(times[0]))
    assert len(times) == training.TIMED_TRAININGS
    seconds = training.seconds_per_step(None, {}, None, {}, 25)
    assert seconds == pytest.approx((20 + 12 + 3) / (25 * digits_task.STEPS_PER_EPOCH))


@pytest.mark.parametrize(
    ("every", "epochs", "wanted"),
    [(0, 4, []), (5, 2, [1, 2]), (10, 3, [1, 2, 3]), (25, 6, [3, 5, 6]), (100, 4, [4])],
)
def test_the_epochs_in_which_the_monitor_is_due(every, epochs, wanted):
    assert digits_task.STEPS_PER_EPOCH == 10
    assert training.monitored_epochs(every, epochs) == wanted


def test_the_monitor_measures_the_parameters_of_its_epochs(monkeypatch):
    """The parameters of a fake training are the number of the epoch."""

    def train_block(params, state, run, images, batches, epochs):
        seen = training.Seen(params + np.arange(1, 11), np.ones(10))
        return training.Block(params + epochs, state, seen)

    fake = training.Trainer(*[None] * 7)._replace(
        init=lambda run, params: 0,
        train_block=train_block,
        measures=lambda w, index, images: {"top": w[index]},
    )
    monkeypatch.setattr(training, "batches_of", lambda seed, first: None)
    run = Runs(0, 0.1, 0.2)
    trained = training.train_run(fake, 0, run, {}, 25, monitored=[1, 10, 11, 25])
    assert trained.monitored["top"].tolist() == [1, 10, 11, 25]
    assert training.train_run(fake, 0, run, {}, 25).monitored is None


@pytest.mark.parametrize("name", models.MODELS)
def test_narrow_models_have_the_same_layers(name):
    model = models.MODELS[name]

    def leaves(make):
        return jax.tree.structure(nnx.eval_shape(lambda: nnx.state(make(nnx.Rngs(0)))))

    assert leaves(model.narrow) == leaves(model.make)


@pytest.mark.slow
@pytest.mark.parametrize("model", models.MODELS)
def test_every_model_trains(model):
    losses_fn, params, batch = models.problem(model, 3)
    losses = losses_fn(params, batch)
    assert losses.shape == (3,)

    @jax.jit
    def step(params):
        loss, g = jax.value_and_grad(lambda params: losses_fn(params, batch).mean())(params)
        return jax.tree.map(lambda w, g: w - 0.1 * g, params, g), loss

    params, loss = step(params)
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-5)
    assert losses_fn(params, batch).mean() < loss


def test_the_digits_are_those_of_scikit_learn():
    from sklearn import datasets  # it takes a second, and every process collects this file

    for found, wanted in zip(
        digits_task.load_digits(), datasets.load_digits(return_X_y=True), strict=True
    ):
        np.testing.assert_array_equal(found, wanted, strict=True)
