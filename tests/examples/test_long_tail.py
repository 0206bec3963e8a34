"""The long-tail example: its splits, how it chooses, what it trains, and what it writes."""

import operator
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import samx
from examples.claims import long_tail
from examples.common.digits_task import initialize, load_digits
from examples.common.tuning import Runs

COUNTS = [100, 59, 35, 21, 12, 7, 4, 2, 1, 1]


@pytest.mark.parametrize(
    ("imbalance", "counts"),
    [
        (100.0, COUNTS),
        (1.0, [100] * 10),
        (10.0, [100, 77, 59, 46, 35, 27, 21, 16, 12, 10]),
        (1e4, [100, 35, 12, 4, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_counts(imbalance, counts):
    assert long_tail.class_counts(imbalance) == counts


def test_groups():
    groups = long_tail.groups_of(COUNTS)
    assert groups == {
        "many": [0, 1, 2, 3],
        "medium": [4, 5, 6],
        "few": [7, 8, 9],
        "all": list(range(10)),
    }
    at_the_limits = long_tail.groups_of([21, 20, 4, 3])
    assert at_the_limits == {"many": [0], "medium": [1, 2], "few": [3], "all": [0, 1, 2, 3]}
    np.testing.assert_array_equal(long_tail.tail_classes([100, 20, 19, 1]), [2, 3])
    samx.imbalanced_sam(long_tail.tail_classes([100] * 10))  # works without a tail, too


def test_splits_are_balanced_and_disjoint_and_a_label_is_one_digit():
    x, digit = load_digits()
    parts = long_tail.split(3, COUNTS)
    train, validation, test = parts
    np.testing.assert_array_equal(np.bincount(train.y), COUNTS)
    np.testing.assert_array_equal(np.bincount(validation.y), [24] * 10)
    np.testing.assert_array_equal(np.bincount(test.y), [50] * 10)
    images = np.concatenate([part.image for part in parts])
    assert len(set(images.tolist())) == len(images) == 242 + 240 + 500
    pairs = {
        pair
        for part in parts
        for pair in zip(part.y.tolist(), digit[np.asarray(part.image)], strict=True)
    }
    assert len(pairs) == 10
    assert [sorted(values) for values in zip(*pairs, strict=True)] == [list(range(10))] * 2
    for part in parts:
        np.testing.assert_allclose(part.x, x[np.asarray(part.image)] / 16, rtol=1e-6)


def test_every_seed_has_its_own_splits():
    _, digit = load_digits()
    seeds = [0, 1, 2, 1000]
    parts = long_tail.splits(seeds, COUNTS)
    orders = {tuple(digit[np.asarray(image[::50])]) for image in parts[2].image}
    assert len(orders) == len(seeds)
    for which, part in enumerate(parts):
        chosen = [frozenset(image.tolist()) for image in part.image]
        assert len(set(chosen)) == len(seeds)
        for image, seed in zip(part.image, seeds, strict=True):
            np.testing.assert_array_equal(image, long_tail.split(seed, COUNTS)[which].image)


def test_batches_have_no_image_twice_and_differ_by_seed_and_epoch():
    batches = [np.asarray(long_tail.shuffled(seed, epoch, 242)) for seed, epoch in [(0, 0), (0, 1)]]
    batches.append(np.asarray(long_tail.shuffled(1, 0, 242)))
    for rows in batches:
        assert rows.shape == (6, 40)
        assert len(np.unique(rows)) == 240
        assert rows.max() < 242
    assert len({rows.tobytes() for rows in batches}) == 3


def losses_by_hand(params, x, y, adjustment):
    """Losses of the digits network, with its parameters in a dictionary."""
    for layer in ("first", "second"):
        x = jax.nn.relu(x @ params[layer]["kernel"] + params[layer]["bias"][None])
    logits = x @ params["head"]["kernel"] + params["head"]["bias"][None] + adjustment[None]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)[:, 0]


@pytest.mark.parametrize(
    ("row", "loss", "variant"),
    [
        ("focal-sam", "ce", lambda rho: samx.focal_sam(COUNTS, rho, 3.0, 0.8)),
        ("imb-sam", "la", lambda rho: samx.imbalanced_sam([4, 5, 6, 7, 8, 9], rho)),
    ],
)
def test_each_run_is_the_plain_loop(row, loss, variant):
    """Each run, with its own seed, learning rate and rho, equals a plain loop from images on."""
    width, epochs = 4, 2
    trainer = long_tail.make_trainer(
        long_tail.METHODS[row], "momentum", loss, width, epochs, COUNTS
    )
    runs = Runs(jnp.array([0, 5]), jnp.array([0.1, 0.3]), jnp.array([0.2, 0.5]))
    train, _, test = long_tail.splits([0, 5], COUNTS)
    start = initialize(runs.seed, width)
    taken = []
    params, state = long_tail.train(trainer, start, runs, train, epochs, lambda: taken.append(1))
    assert len(taken) == epochs
    np.testing.assert_allclose(optax.tree.get(state, "gradients_spent"), 12 * 8 / 3, rtol=1e-5)
    of_class = trainer.accuracy(params, test)
    adjustment = np.log(np.array(COUNTS) / 242) if loss == "la" else np.zeros(10)

    def optimizer(rate, rho):
        schedule = optax.cosine_decay_schedule(rate, 12)
        sgd = optax.sgd(schedule, momentum=0.9)
        return optax.chain(variant(rho), optax.clip_by_global_norm(1.0), sgd)

    @jax.jit
    def init(w, rate, rho):
        return optimizer(rate, rho).init(w)

    @jax.jit
    def step(w, state, rate, rho, x, y):
        updates, state = optimizer(rate, rho).update(
            *(w, state, w),  # the gradient is not read
            losses_fn=lambda w, batch: losses_by_hand(w, batch["x"], batch["y"], adjustment),
            batch={"x": x, "y": y},
            labels=y,
        )
        return optax.apply_updates(w, updates), state

    of_label = jax.jit(losses_by_hand)
    starts = jax.device_get(nnx.to_pure_dict(initialize(runs.seed, width)))
    found, train, test = jax.device_get((nnx.to_pure_dict(params), train, test))
    for index, (seed, rate, rho) in enumerate(zip(*runs, strict=True)):
        w = jax.tree.map(operator.itemgetter(index), starts)
        state = init(w, rate, rho)
        for epoch in range(epochs):
            for rows in np.asarray(long_tail.shuffled(seed, epoch, 242)):
                w, state = step(w, state, rate, rho, train.x[index][rows], train.y[index][rows])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
            *(w, jax.tree.map(operator.itemgetter(index), found)),
        )
        y = test.y[index]
        losses = [
            of_label(w, test.x[index], np.full(500, label), np.zeros(10, np.float32))
            for label in range(10)
        ]
        is_right = np.argmin(losses, axis=0) == y
        shares = [is_right[y == label].mean() for label in range(10)]
        np.testing.assert_allclose(of_class[index], shares, atol=0.021)  # one of 50 images


def test_values_are_chosen_on_validation_images_of_seeds_of_their_own(monkeypatch, tmp_path):
    """The trainer is a fake: its parameters are the runs, and its accuracies are made up."""
    looked = []

    def accuracy(runs, part):
        looked.append((runs, part))
        is_best = (runs.learning_rate == np.float32(0.1)) & (runs.rho == np.float32(0.5))
        # One seed is better elsewhere, but the mean over seeds is not: it must not decide.
        is_lure = (runs.seed == 1001) & (runs.learning_rate == np.float32(0.3))
        level = 0.2 * is_best + 0.3 * is_lure
        return np.asarray(level)[:, None] + np.linspace(0, 0.09, 10)[None]

    fake = long_tail.Trainer(
        init=lambda runs, params: {},
        epoch=lambda params, state, runs, part, index: (runs, state),
        accuracy=accuracy,
    )
    monkeypatch.setattr(long_tail, "make_trainer", lambda *args: fake)
    monkeypatch.setattr(long_tail, "draw", lambda *args: None)
    (result,) = long_tail.main(["--variants", "sam", "--seeds", "3", "--out", f"{tmp_path}/new"])
    assert (result["learning_rate"], result["rho"]) == (0.1, 0.5)
    best = max(result["candidates"], key=lambda candidate: candidate["validation_accuracy"])
    assert (best["learning_rate"], best["rho"]) == (0.1, 0.5)
    assert best["validation_accuracy"] == pytest.approx(0.245)
    assert len(result["candidates"]) == 5 * 5
    assert result["edges"] == []

    tuned, *reported = looked
    for runs, part in looked:
        which = {242: 0, 240: 1, 500: 2}[part.x.shape[1]]
        for seed, image in zip(runs.seed.tolist()[:6], part.image, strict=False):
            np.testing.assert_array_equal(image, long_tail.split(seed, COUNTS)[which].image)
    assert tuned[1].x.shape == (100, 240, 64)
    assert set(tuned[0].seed.tolist()) == {1000, 1001, 1002, 1003}
    assert Counter(part.x.shape[:2] for _, part in reported) == {(3, 500): 1, (3, 242): 1}
    for runs, _ in reported:
        assert runs.seed.tolist() == [0, 1, 2]
        np.testing.assert_allclose([runs.learning_rate, runs.rho], [[0.1] * 3, [0.5] * 3])


def test_a_tiny_run(in_empty_folder, monkeypatch, capsys, read_report):
    """Every stage has the same number of runs, which saves compilation."""
    monkeypatch.setattr(long_tail, "TUNING_SEEDS", range(1000, 1001))
    monkeypatch.setitem(long_tail.LEARNING_RATES, "momentum", (0.1, 0.3))
    arguments = "--seeds 2 --epochs 2 --width 4 --rho 0.1 --imbalance 10 --variants base focal-sam"
    results = long_tail.main(arguments.split())
    folder = in_empty_folder / "runs" / "long_tail-001"
    report = read_report(folder)
    assert report["results"] == results
    assert report["class_counts"] == [100, 77, 59, 46, 35, 27, 21, 16, 12, 10]
    groups = {"many": [*range(7)], "medium": [7, 8, 9], "few": [], "all": [*range(10)]}
    assert report["groups"] == groups
    del groups["few"]
    assert report["samx"] == samx.__version__
    assert report["settings"] == {
        "variants": ["base", "focal-sam"],
        "base": "momentum",
        "loss": "ce",
        "imbalance": 10.0,
        "seeds": 2,
        "epochs": 2,
        "rho": [0.1],
        "width": 4,
    }
    assert (folder / "long_tail.png").stat().st_size > 10_000
    assert [(r["row"], r["rho"]) for r in results] == [("base", 0.0), ("focal-sam", 0.1)]
    printed = capsys.readouterr().out
    for result, gradients in zip(results, (20, 20 * 8 / 3), strict=True):
        accuracy = np.array(result["test_accuracy"])
        assert accuracy.shape == np.shape(result["train_accuracy"]) == (2, 10)
        assert accuracy.max() > 0.1
        np.testing.assert_allclose(accuracy * 50, np.round(accuracy * 50), atol=1e-4)
        assert list(result["test_accuracy_by_group"]) == list(groups)
        for name, values in result["test_accuracy_by_group"].items():
            np.testing.assert_allclose(values, accuracy[:, groups[name]].mean(axis=1))
        assert result["gradients"] == pytest.approx(gradients)
        assert [c["rho"] for c in result["candidates"]] == [result["rho"]] * 2
        assert result["edges"] == ["learning_rate"]
        line = next(line for line in printed.splitlines() if line.startswith(result["row"]))
        assert f"{100 * accuracy.mean():.2f} ± " in line
    for text in (
        "device:",
        "100, 77, 59, 46, 35, 27, 21, 16, 12, 10",
        "2 seeds",
        "results.json",
        "png",
    ):
        assert text in printed
    assert "method - sam" not in printed


def row_of(name, many, everything, **changes):
    groups = {"many": many, "all": everything}
    result = {"row": name, "test_accuracy_by_group": groups, "gradients": 12.0}
    return result | {"learning_rate": 0.3, "rho": 0.1, "edges": []} | changes


def test_tables_and_differences():
    sam = row_of("sam", [0.9, 0.8], [0.5, 0.7])
    imb = row_of("imb-sam", [0.8, 0.7], [0.6, 0.9])
    head, _, _, row = (" ".join(row.split()) for row in long_tail.table([imb, sam]).splitlines())
    assert head == "method many all gradients lr rho"
    assert row == "sam 85.00 ± 5.00 60.00 ± 10.00 12 0.3 0.1"
    (row,) = long_tail.comparison([imb, sam]).splitlines()[2:]
    # The differences are paired, so their errors are smaller.
    assert " ".join(row.split()) == "imb-sam -10.00 ± 0.00 +15.00 ± 5.00"
    assert long_tail.comparison([sam]) == long_tail.comparison([imb]) == ""


def test_the_end_of_a_grid_is_marked():
    inside, low = row_of("base", [1], [1]), row_of("sam", [1], [1], edges=["learning_rate"])
    assert "*" not in long_tail.table([inside])
    lines = long_tail.table([inside, low]).splitlines()
    assert [line.split()[-2:] for line in lines[2:4]] == [["0.3", "0.1"], ["0.3*", "0.1"]]
    assert lines[4].startswith("*: at an edge")


@pytest.mark.parametrize("imbalance", [1.0, 10.0])
def test_groups_without_classes_and_a_single_seed_are_drawn(imbalance, tmp_path):
    counts = long_tail.class_counts(imbalance)
    names = [name for name, classes in long_tail.groups_of(counts).items() if classes]
    result = {"row": "sam", "test_accuracy": [[0.5] * 10]}
    result["test_accuracy_by_group"] = {name: [0.5] for name in names}
    long_tail.draw([result], counts, tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds 0", "--seeds must be at least 1, got 0"),
        ("--seeds 1001", "--seeds must be at most 1000, got 1001"),
        ("--epochs -1", "--epochs must be at least 1, got -1"),
        ("--width 0", "--width must be at least 1, got 0"),
        ("--imbalance 0.5", "--imbalance must be finite and at least 1, got 0.5"),
        ("--imbalance nan", "--imbalance must be finite and at least 1, got nan"),
        ("--imbalance inf", "--imbalance must be finite"),
        ("--rho 0.1 -0.1", "--rho must be finite and at least 0"),
        ("--rho nan", "--rho must be finite and at least 0"),
        ("--loss mse", "--loss: invalid choice: 'mse'"),
        ("--base adagrad", "--base: invalid choice: 'adagrad'"),
        ("--variants sam sammy", "--variants: invalid choice: 'sammy'"),
        ("--out taken", "--out: taken is not empty"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert re.search(message, refusal(long_tail.main, arguments))


def test_claims_are_paired_differences_of_a_group_in_points():
    sam, other = {"few": [0.1, 0.2], "all": [0.5, 0.6]}, {"few": [0.3, 0.1], "all": [0.4, 0.8]}
    results = [
        {"row": "sam", "test_accuracy_by_group": sam},
        {"row": "imb-sam", "test_accuracy_by_group": other},
    ]
    found = long_tail.values_of(results)
    assert found.keys() == {"imbalanced-few", "imbalanced-all"}
    assert found["imbalanced-few"] == pytest.approx([20.0, -10.0])
    assert found["imbalanced-all"] == pytest.approx([-10.0, 20.0])
