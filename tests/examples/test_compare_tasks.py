"""The tasks of the comparison: their splits and networks, without training."""

import jax
import numpy as np
import pytest
from flax import nnx

from examples.compare import fine_tuning, language, mnist, mnist1d
from examples.compare.tasks import TASKS


def splits_of(name, seed):
    try:
        return TASKS[name].data(seed)
    except ImportError as error:
        pytest.skip(str(error))


def logits_of(task, x):
    """Return the shape of the logits."""

    def logits(x):
        model = task.network(nnx.Rngs(0))
        return model.head(model.features(x))

    return jax.eval_shape(logits, x).shape


def layout(splits):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), splits)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_what_it_says(name):
    task, splits = TASKS[name], splits_of(name, 0)
    train, *others = splits
    y = train["y"]
    assert {type(leaf) for leaf in jax.tree.leaves(splits)} == {np.ndarray}
    assert len(train["x"]) == len(y) == task.num_train >= max(task.batch, task.measured)
    np.testing.assert_array_equal(train["index"], np.arange(task.num_train))
    assert y.dtype == train["index"].dtype == np.int32
    *lead, classes = logits_of(task, train["x"][:3])
    assert tuple(lead) == (3, *y.shape[1:])
    for split in splits:
        assert split["x"].dtype in (np.float32, np.int32)
        assert np.isfinite(split["x"]).all()
        assert 0 <= split["y"].min() <= split["y"].max() < classes
    for split in others:
        assert {*split} == {"x", "y", "weight"}
        assert split["weight"].dtype == np.float32
        assert split["weight"].shape == (len(split["y"]),)
        assert split["weight"].mean() == pytest.approx(1, abs=1e-6)
    assert bool(task.input_noise) == (train["x"].dtype == np.float32)


@pytest.mark.parametrize("name", TASKS)
def test_every_seed_has_its_own_splits_of_the_same_shapes(name):
    one, other = (splits_of(name, seed) for seed in (0, 1000))
    assert layout(one) == layout(other)
    for a, b in zip(one, other, strict=True):
        assert np.mean(a["x"] == b["x"]) < 0.9


@pytest.mark.parametrize("name", TASKS)
def test_no_example_is_in_two_splits(name):
    rows = [{x.tobytes() for x in split["x"]} for split in splits_of(name, 0)]
    assert len(set().union(*rows)) == sum(map(len, rows))


@pytest.mark.parametrize("name", [name for name in TASKS if TASKS[name].input_noise])
def test_labels_belong_to_their_examples(name):
    """The nearest mean of a class tells the class better than chance does."""
    train, *others = splits_of(name, 0)
    x, y = train["x"].reshape(len(train["x"]), -1), train["y"]
    means = np.stack([x[y == k].mean(axis=0) for k in range(y.max() + 1)])
    for split in others:
        distances = [np.square(split["x"].reshape(-1, len(m)) - m).sum(axis=1) for m in means]
        is_right = np.argmin(distances, axis=0) == split["y"]
        assert np.mean(is_right * split["weight"]) > 1.5 / len(means)


@pytest.mark.parametrize("name", [name for name in TASKS if TASKS[name].counts])
def test_imbalanced_classes_are_balanced_by_the_weights(name):
    train, *others = splits_of(name, 0)
    counts = np.bincount(train["y"])
    np.testing.assert_array_equal(counts, TASKS[name].counts)
    for split in others:
        shares = np.bincount(split["y"], split["weight"]) / len(split["y"])
        np.testing.assert_allclose(shares, 1 / len(counts), rtol=1e-6)


@pytest.mark.parametrize(
    ("noisy", "clean", "wrong"),
    [("digits-noisy", "digits-clean", 0.3), ("mnist-noisy", "mnist-clean", 0.4)],
)
def test_a_stated_share_of_the_training_labels_is_wrong(noisy, clean, wrong):
    noisy, clean = splits_of(noisy, 3), splits_of(clean, 3)
    np.testing.assert_array_equal(noisy.train["x"], clean.train["x"])
    assert np.mean(noisy.train["y"] != clean.train["y"]) == pytest.approx(wrong)
    for a, b in zip(noisy[1:], clean[1:], strict=True):
        np.testing.assert_array_equal(a["y"], b["y"])


def test_windows_predict_the_next_bytes():
    train, *_ = TASKS["language"].data(0)
    np.testing.assert_array_equal(train["x"][:, 1:], train["y"][:, :-1])
    x, _ = language.load()
    assert len({row.tobytes() for row in x}) == len(x) > 5000
    kept = language.unique(["a b", "a\n  b", "c", "a b"])
    assert [" ".join(text.split()) for text in kept] == ["a b", "c"]


def test_fine_tuning_starts_with_the_parameters_of_its_network(monkeypatch):
    task, images = TASKS["fine-tuning"], fine_tuning.images
    splits_of("fine-tuning", 0)
    monkeypatch.setattr(images, "start_of", images.start_of.__wrapped__)  # keep no traced arrays
    model = nnx.eval_shape(lambda: task.network(nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert layout(jax.eval_shape(lambda: fine_tuning.start(0))) == layout(params)


def test_patches_are_those_of_a_convolution_with_strides():
    x = np.arange(2 * 7 * 7 * 3.0, dtype=np.float32).reshape(2, 7, 7, 3)
    found = np.asarray(mnist.patches(x)).reshape(2, 3, 3, 3, 3, 3)
    for row, column in np.ndindex(3, 3):
        there = slice(2 * row, 2 * row + 3), slice(2 * column, 2 * column + 3)
        np.testing.assert_array_equal(found[:, row, column], x[:, *there])


# The first numbers of signals of the published data set, mnist1d_data.pkl.
PUBLISHED = {
    0: (2, [-0.332006, -0.47191, -0.778697, -1.009741, -0.882353, 0.103935, 1.643284, 1.652507]),
    1: (6, [1.965481, 2.300213, 2.213393, 1.989174, 1.627667, 0.791194, 0.91125, 0.820723]),
    4999: (4, [-0.519329, -0.698723, -1.281038, -2.161015, -2.389421, -0.242339, -0.145678]),
}


def test_the_signals_are_the_published_ones():
    x, y = mnist1d.make_pool()
    assert x.shape == (5000, 40)
    assert y[:20].tolist() == [2, 6, 4, 5, 6, 6, 6, 0, 3, 1, 6, 9, 4, 3, 4, 5, 1, 9, 0, 3]
    for row, (label, numbers) in PUBLISHED.items():
        assert y[row] == label
        np.testing.assert_allclose(x[row, : len(numbers)], numbers, atol=2e-6)


def test_tabular_data_are_standardized_by_the_training_split():
    train, _, test = TASKS["tabular"].data(0)
    np.testing.assert_allclose(train["x"].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(train["x"].std(axis=0), 1, atol=1e-5)
    assert abs(test["x"].mean()) > 0.1
