"""The batches of the CIFAR example: noise, imbalance, subsets, augmentation, and resuming."""

import itertools
import json
from collections import Counter

import jax
import numpy as np
import pytest

from examples.train import cifar_data
from examples.train.cifar_data import Images


def random_rows(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


# Changing the data


def numbered(label):
    """Images that hold their own position, to see which ones are kept."""
    return Images(np.arange(len(label)), np.asarray(label, np.int32))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.333, 0.9])
def test_label_noise_is_exact_and_uniform(share):
    images = numbered(np.arange(20_001) % 10)
    noisy = cifar_data.with_label_noise(images, share, 10, seed=3)
    changed = noisy.label != images.label
    assert changed.sum() == round(share * 20_001)
    assert noisy.label.dtype == np.int32
    np.testing.assert_array_equal(noisy.image, images.image)
    np.testing.assert_array_equal(images.label, np.arange(20_001) % 10)
    shifts = np.bincount((noisy.label - images.label)[changed] % 10, minlength=10)[1:]
    expected = changed.sum() / 9
    assert np.abs(shifts - expected).max() <= 5 * np.sqrt(expected)
    by_half = changed[:10_000].sum() - changed[10_000:].sum()  # not only in the first half
    assert abs(by_half) <= 5 * np.sqrt(changed.sum() + 1)


def test_long_tail_has_the_published_counts():
    # CIFAR-10-LT with imbalance 100, in the literature on https://arxiv.org/abs/1901.05555.
    images = numbered(np.random.default_rng(0).permutation(np.arange(50_000) % 10))
    tail = cifar_data.long_tailed(images, 100, 10, seed=0)
    np.testing.assert_array_equal(
        np.bincount(tail.label), [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    )
    assert (np.diff(tail.image) > 0).all()
    np.testing.assert_array_equal(tail.label, images.label[tail.image])
    assert tail.image[tail.label == 9].max() > 25_000  # drawn from all images


def test_long_tail_of_unequal_classes():
    images = numbered([0] * 8 + [1] * 20 + [2] * 3 + [3] * 20)
    for imbalance, counts in ((1, [8, 20, 3, 20]), (8, [8, 10, 3, 2]), (1e9, [8, 1, 1, 1])):
        tail = cifar_data.long_tailed(images, imbalance, 4, seed=0)
        np.testing.assert_array_equal(np.bincount(tail.label), counts)
    exact = cifar_data.long_tailed(numbered(np.arange(294) % 3), 49, 3, seed=0)
    np.testing.assert_array_equal(np.bincount(exact.label), [98, 14, 2])  # 98 / 49 is exactly 2


def test_subset_is_balanced_and_in_order():
    images = numbered([0] * 2 + [1] * 30 + [2] * 30)
    for count, counts in ((12, [2, 5, 5]), (6, [2, 2, 2]), (62, [2, 30, 30])):
        chosen = cifar_data.subset(images, count, seed=0)
        np.testing.assert_array_equal(np.bincount(chosen.label), counts)
        assert (np.diff(chosen.image) > 0).all()
        np.testing.assert_array_equal(chosen.label, images.label[chosen.image])
    odd = [tuple(np.bincount(cifar_data.subset(images, 13, s).label)) for s in range(20)]
    assert set(odd) == {(2, 6, 5), (2, 5, 6)}  # no class is preferred
    few = [cifar_data.subset(images, 1, seed).label[0] for seed in range(40)]
    assert set(few) == {0, 1, 2}


CHANGES = {
    "noise": lambda images, seed: cifar_data.with_label_noise(images, 0.5, 10, seed),
    "tail": lambda images, seed: cifar_data.long_tailed(images, 10, 10, seed),
    "subset": lambda images, seed: cifar_data.subset(images, 100, seed),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_depend_on_the_seed_alone(change):
    images = numbered(np.arange(500) % 10)
    first, again, other = (CHANGES[change](images, seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not all(map(np.array_equal, first, other))


def test_one_seed_serves_every_change():
    images = numbered([0] + [1] * 999)
    tail = set(cifar_data.long_tailed(images, 2, 2, seed=0).image)
    chosen = set(cifar_data.subset(images, 500, seed=0).image)
    noisy = cifar_data.with_label_noise(images, 0.5, 2, seed=0).label != images.label
    for one, two in itertools.combinations((tail, chosen, set(np.flatnonzero(noisy))), 2):
        assert len(one) == len(two) == 500
        assert 200 < len(one & two) < 300  # chosen independently


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i: cifar_data.with_label_noise(i, 1.0, 10, 0), r"share must be in \[0, 1\), got 1"),
        (lambda i: cifar_data.with_label_noise(i, -0.1, 10, 0), "share must .* got -0.1"),
        (lambda i: cifar_data.with_label_noise(i, np.nan, 10, 0), "share must .* got nan"),
        (lambda i: cifar_data.with_label_noise(i, 0.1, 9, 0), "classes must be at least 10 .* 9"),
        (lambda i: cifar_data.with_label_noise(i, 0.1, 10, -1), "seed must be at least 0, got -1"),
        (lambda i: cifar_data.long_tailed(i, 0.5, 10, 0), "imbalance .* at least 1, got 0.5"),
        (lambda i: cifar_data.long_tailed(i, np.inf, 10, 0), "imbalance must be finite .* got inf"),
        (lambda i: cifar_data.long_tailed(i, 2, 1, 0), "classes must be at least 10 .* got 1"),
        (lambda i: cifar_data.subset(i, 21, 0), r"count must be in \[1, 20\], got 21"),
        (lambda i: cifar_data.subset(i, 0, 0), r"count must be in \[1, 20\], got 0"),
        (lambda i: train(i, 21), r"batch_size must be in \[1, 20\], got 21"),
        (lambda i: train(i, 0), r"batch_size must be in \[1, 20\], got 0"),
        (lambda i: train(i, 2, augment="flip"), 'augment must be "none" or "standard", got'),
        (lambda i: train(i, 2, seed=-1), r"seed must be in \[0, 2\*\*32\), got -1"),
        (lambda i: train(i, 2, threads=-1), "num_threads must be non-negative, got -1"),
        (lambda i: cifar_data.test_batches(i, 0), "batch_size must be at least 1, got 0"),
        (lambda i: cifar_data.normalize(i.image / 255), "image must be uint8, got float64"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(numbered(np.arange(20) % 10))


# Batching


def train(images, batch_size, seed=0, augment="none", threads=0):
    return cifar_data.train_batches(
        images, batch_size, seed=seed, augment=augment, num_threads=threads
    )


@pytest.fixture(scope="module")
def images():
    rows = random_rows(50)
    return Images(rows.reshape(50, 32, 32, 3), (np.arange(50) % 7).astype(np.int32))


def following(iterator, count=5):
    return [next(iterator) for _ in range(count)]


def test_every_epoch_has_every_image_once(images):
    batches = following(train(images, 16), 25)  # 8 epochs of 50; most end inside a batch
    index = np.concatenate([batch["index"] for batch in batches]).reshape(8, 50)
    np.testing.assert_array_equal(np.sort(index), np.tile(np.arange(50), (8, 1)))
    assert len({tuple(epoch) for epoch in index} | {tuple(range(50))}) == 9
    for batch in batches:
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
            "image": ((16, 32, 32, 3), np.uint8),
            "label": ((16,), np.int32),
            "index": ((16,), np.int32),
        }
        np.testing.assert_array_equal(batch["image"], images.image[batch["index"]])
        np.testing.assert_array_equal(batch["label"], images.label[batch["index"]])


def test_batches_depend_on_the_seed_and_not_on_threads(images):
    expected = following(train(images, 16, seed=5, augment="standard"), 12)
    for threads in (1, 4):
        iterator = train(images, 16, seed=5, augment="standard", threads=threads)
        jax.tree.map(np.testing.assert_array_equal, following(iterator, 12), expected)
        iterator.close()
    other = following(train(images, 16, seed=6, augment="standard"), 12)
    assert not np.array_equal(other[0]["index"], expected[0]["index"])
    plain = following(train(images, 16, seed=5), 12)
    assert not np.array_equal(plain[0]["image"], expected[0]["image"])


@pytest.mark.parametrize(
    ("position", "threads"),
    [*((p, 0) for p in (0, 1, 2, 3, 4, 25, 31)), (0, 3), (3, 3), (31, 3)],
)  # batch 3 crosses into epoch 1
def test_resumes_at_the_next_batch(position, threads, images):
    iterator = train(images, 16, augment="standard", threads=threads)
    following(iterator, position)
    state = json.dumps(iterator.get_state())
    assert len(state) < 100
    expected = following(iterator)
    fresh = train(images, 16, augment="standard", threads=threads)
    fresh.set_state(json.loads(state))
    jax.tree.map(np.testing.assert_array_equal, following(fresh), expected)
    iterator.set_state(json.loads(state))  # go back while batches are prefetched
    jax.tree.map(np.testing.assert_array_equal, following(iterator), expected)
    for used in (iterator, fresh):
        used.close()


def slow_crop_and_flip(images, tops, lefts, mirrored):
    results = []
    for image, top, left, mirror in zip(images, tops, lefts, mirrored, strict=True):
        padded = np.zeros((40, 40, 3), np.uint8)
        padded[4:36, 4:36] = image
        crop = padded[top : top + 32, left : left + 32]
        results.append(crop[:, ::-1] if mirror else crop)
    return np.stack(results)


def test_augmentation_crops_and_flips_as_the_slow_one(images):
    before = images.image.copy()
    generator = np.random.default_rng(7)
    tops, lefts = generator.integers(0, 9, (2, 50))
    mirrored = generator.random(50) < 0.5
    got = cifar_data.crop_and_flip(images.image, np.random.default_rng(7))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, slow_crop_and_flip(before, tops, lefts, mirrored))
    np.testing.assert_array_equal(images.image, before)


def test_augmented_batches_hold_every_crop_and_flip(images):
    choices = np.array(list(itertools.product(range(9), range(9), (False, True))))
    variants = {}  # from (index, bytes of the result) to the choice
    for index, image in enumerate(images.image):
        results = slow_crop_and_flip([image] * len(choices), *choices.T)
        for choice, result in zip(choices, results, strict=True):
            variants[index, result.tobytes()] = tuple(choice)
    batches = following(train(images, 50, augment="standard"), 20)
    seen = Counter(
        variants[int(index), image.tobytes()]
        for batch in batches
        for index, image in zip(batch["index"], batch["image"], strict=True)
    )
    for position, values in enumerate((range(9), range(9), (0, 1))):
        counts = Counter()
        for choice, count in seen.items():
            counts[choice[position]] += count
        expected = 1000 / len(values)
        for value in values:
            assert abs(counts[value] - expected) < 5 * np.sqrt(expected)
    assert len(seen) > 150  # of 162 choices: crop and flip are independent


@pytest.mark.parametrize("batch_size", [16, 50, 64, 1])
def test_test_batches_go_through_once_in_order(batch_size, images):
    batches = list(cifar_data.test_batches(images, batch_size))
    assert len(batches) == -(-50 // batch_size)
    for batch in batches:
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
            "image": ((batch_size, 32, 32, 3), np.uint8),
            "label": ((batch_size,), np.int32),
            "weight": ((batch_size,), np.float32),
        }
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    np.testing.assert_array_equal(whole["image"][:50], images.image)
    np.testing.assert_array_equal(whole["label"][:50], images.label)
    np.testing.assert_array_equal(whole["weight"], np.arange(len(whole["weight"])) < 50)
    assert not whole["image"][50:].any()
    assert not whole["label"][50:].any()


@pytest.mark.parametrize("function", [cifar_data.normalize, jax.jit(cifar_data.normalize)])
def test_normalize(function, images):
    got = function(images.image)
    assert got.dtype == np.float32
    for channel, (mean, std) in enumerate([(0.4914, 0.2470), (0.4822, 0.2435), (0.4465, 0.2616)]):
        expected = (images.image[..., channel] / 255 - mean) / std
        np.testing.assert_allclose(got[..., channel], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(function(images.image[0]), got[0], rtol=1e-6)
