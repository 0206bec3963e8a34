"""Text that every Python ships: the sources of its standard library, as bytes, split by file.

The sources hold code and English; `pydoc_data/topics.py` is Python's own manual. A tenth of the
files is held out, chosen by their names. So the split is the same on every machine, and no file is
in both parts. The text itself differs a little from one version of Python to the next.
"""

import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

# Folders that some Pythons leave out, and packages that do not belong to Python.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
HELD_OUT = 10  # one of so many files
VOCABULARY = 256  # bytes
PREFETCHED = 4  # batches


class Text(NamedTuple):
    """Text to train on, and text that is held out: uint8 arrays."""

    train: np.ndarray
    held_out: np.ndarray


def load(folder: str | Path | None = None) -> Text:
    """Read all Python files in a folder, in the order of their names, as one text for each part.

    Args:
        folder: By default the standard library of this Python.

    Raises:
        ValueError: If the folder has too few files for both parts.
    """
    return Text(*(np.concatenate(part) for part in load_files(folder)))


def load_files(folder: str | Path | None = None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Read all Python files in a folder: those to train on, and those that are held out."""
    root = Path(folder or sysconfig.get_path("stdlib"))
    parts: tuple[list[bytes], list[bytes]] = [], []
    for name in names_of(root):
        parts[is_held_out(name)].append((root / name).read_bytes())
    if not all(map(any, parts)):
        raise ValueError(f"{root} has too few Python sources to train on")
    train, held_out = ([np.frombuffer(text, np.uint8) for text in part] for part in parts)
    return train, held_out


def names_of(root: Path) -> list[str]:
    """Return the names of the Python files in a folder, in order."""
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(path.as_posix() for path in paths if not LEFT_OUT & set(path.parts))


def is_held_out(name: str) -> bool:
    """Tell whether a file is held out."""
    return zlib.crc32(name.encode()) % HELD_OUT == 0


def train_batches(
    text: np.ndarray, length: int, batch_size: int, *, seed: int, num_threads: int = 2
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Return an endless iterator of batches, in a new order every epoch.

    The text is cut into examples of `length` bytes to predict. Every epoch is a permutation of
    them. `get_state()` of the iterator is small; `set_state` continues with the same batches.

    Args:
        text: uint8[N].
        length: Bytes to predict in an example.
        batch_size: Examples in every batch; at most the number of examples.
        seed: Determines the order.
        num_threads: Threads that prepare batches in advance; 0 prepares them on demand.

    Returns:
        An iterator of {"tokens": int32[B, length + 1], "index": int32[B]}. A token but the first is
        what the tokens before it should predict. `index` is the number of the example.
    """
    count = examples_in(text, length)
    if not 1 <= batch_size <= count:
        raise ValueError(f"batch_size must be in [1, {count}], got {batch_size}")

    def gather(index: np.ndarray) -> dict[str, np.ndarray]:
        return {"tokens": windows(text, length, index * length), "index": index.astype(np.int32)}

    order = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
    batches = order.batch(batch_size, drop_remainder=True).map(gather)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads, PREFETCHED)))


def examples_in(text: np.ndarray, length: int) -> int:
    """Return how many examples of `length` bytes to predict a text has."""
    return max(0, (len(text) - 1) // length)


def windows(text: np.ndarray, length: int, starts: np.ndarray) -> np.ndarray:
    """Return `length + 1` bytes from each start on, int32[starts, length + 1]."""
    return text[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def spread_starts(text: np.ndarray, length: int, count: int) -> np.ndarray:
    """Return the starts of `count` windows all over a text; two bytes precede each target."""
    last = len(text) - length - 1
    if last < count:
        raise ValueError(f"the held-out text is too short for {count} examples of {length} bytes")
    return np.linspace(1, last, count).astype(np.int64)


def trigram_loss(train: np.ndarray, text: np.ndarray, length: int, starts: np.ndarray) -> float:
    """Return the mean loss, in nats per byte, of a trigram model on the targets of some windows.

    The model counts, in `train`, which byte follows each pair of bytes. Witten-Bell smoothing mixes
    in the bigram model, and that mixes in the counts of single bytes: after a context that was
    followed by `u` different bytes in `n` places, the shorter context has the weight u / (n + u).
    """
    p = np.full(VOCABULARY, 1 / VOCABULARY)
    code = np.zeros(len(train), np.int64)
    for order in range(3):  # contexts of 0, 1 and 2 bytes
        code = code[: len(train) - order] * VOCABULARY + train[order:]
        counts = np.bincount(code, minlength=VOCABULARY ** (order + 1)).astype(np.float32)
        counts = counts.reshape((VOCABULARY,) * (order + 1))
        total = counts.sum(axis=-1, keepdims=True)
        seen = (counts > 0).sum(axis=-1, keepdims=True)
        seen = np.maximum(seen, total == 0)  # a context without counts: the shorter one alone
        p = (counts + seen * p) / (total + seen)
    at = starts[:, None] + np.arange(1, length + 1)
    return float(-np.log(p[text[at - 2], text[at - 1], text[at]]).mean(dtype=np.float64))
