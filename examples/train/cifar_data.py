"""CIFAR-10 and CIFAR-100 for the examples: load, change and batch them.

`load` reads the standard Python archives. They have to be downloaded by hand; `load` never writes.
`write_digits` makes a small archive of the same form from scikit-learn's digits, for machines
without CIFAR. `train_batches` is a grain pipeline that can resume at any batch.
"""

import contextlib
import gzip
import io
import math
import pickle
import pickletools
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from examples.common import files
from examples.common.digits_task import load_digits

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # CIFAR-10's channels
PADDING = 4  # pixels on each side, before the random crop
# The archives unpack to 186 MB; the largest file, "train" of CIFAR-100, has 155 MB.
MOST_BYTES, MOST_OF_A_FILE = 256_000_000, 192_000_000
PUTS = ("PUT", "BINPUT", "LONG_BINPUT")  # codes of a pickle that number an object
PREFETCHED = 16  # batches that the threads prepare in advance
WHERE = (
    "from https://www.cs.toronto.edu/~kriz/cifar.html: "
    "cifar-10-python.tar.gz (md5 c58f30108f718f92721af3b95e74349a) or "
    "cifar-100-python.tar.gz (md5 eb9058c3a382ffc7106e4002c42a8d85)"
)


class Images(NamedTuple):
    """Images and their classes."""

    image: np.ndarray  # uint8[N, 32, 32, 3]
    label: np.ndarray  # int32[N]


class Cifar(NamedTuple):
    """A data set; `classes[label]` is the name of a class."""

    train: Images
    test: Images
    classes: tuple[str, ...]


class Layout(NamedTuple):
    """Names of a data set's archive, folder and files, and of the keys in the files."""

    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: bytes
    names: bytes

    @property
    def members(self) -> set[str]:
        """Names of all files."""
        return {*self.train, self.test, self.meta}


CIFAR10 = Layout(
    "cifar-10-python.tar.gz",
    "cifar-10-batches-py",
    tuple(f"data_batch_{number}" for number in range(1, 6)),
    "test_batch",
    "batches.meta",
    b"labels",
    b"label_names",
)
CIFAR100 = Layout(
    "cifar-100-python.tar.gz",
    "cifar-100-python",
    ("train",),
    "test",
    "meta",
    b"fine_labels",
    b"fine_label_names",
)
LAYOUTS = (CIFAR10, CIFAR100)
MEMBERS = CIFAR10.members | CIFAR100.members


def load(path: str | Path) -> Cifar:
    """Read CIFAR-10, or CIFAR-100 with its fine labels, in the order of the files.

    Args:
        path: The archive, under any name; or the folder extracted from it; or a folder that holds
            one of these under its original name.

    Raises:
        FileNotFoundError: If the path does not exist, or the folder holds no data set.
        ValueError: If the folder holds several data sets, or the files cannot be used.
    """
    path = find(Path(path))
    found = read_folder(path) if path.is_dir() else read_archive(path)
    layout = max(LAYOUTS, key=lambda layout: len(layout.members & found.keys()))
    missing = sorted(layout.members - found.keys())
    if missing:
        raise damaged(path, f"has no {', '.join(missing)}")
    (names,) = unpickle(path, layout.meta, found[layout.meta], [layout.names])
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise damaged(path, f"{layout.meta}: {layout.names} is not a list of names: {names!r:.60}")

    def images(member: str) -> Images:
        data, labels = unpickle(path, member, found[member], [b"data", layout.labels])
        check_images(path, member, data, labels, len(names))
        image = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # three planes become channels
        return Images(np.ascontiguousarray(image), np.asarray(labels, np.int32))

    train = Images(*map(np.concatenate, zip(*map(images, layout.train), strict=True)))
    return Cifar(train, images(layout.test), tuple(name.decode("latin1") for name in names))


def find(path: Path) -> Path:
    """Return the archive or extracted folder that `path` is or holds."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Download it {WHERE}")
    if not path.is_dir():
        return path
    names = [name for layout in LAYOUTS for name in (layout.archive, layout.folder)]
    held = [name for name in names if (path / name).exists()]
    if len(held) > 1:
        raise ValueError(f"{path} holds several data sets; choose one: {', '.join(held)}")
    if held:
        return find(path / held[0])
    if not read_folder(path):
        raise FileNotFoundError(f"{path} holds no data set. Download one {WHERE}")
    return path


def read_folder(folder: Path) -> dict[str, bytes]:
    """Read the files of an extracted folder."""
    paths = [folder / member for member in sorted(MEMBERS)]
    try:
        return {path.name: files.read(path, MOST_OF_A_FILE) for path in paths if path.is_file()}
    except ValueError as error:
        raise damaged(folder, str(error)) from error


def read_archive(archive: Path) -> dict[str, bytes]:
    """Read the files of an archive without extracting it."""
    if not archive.is_file():
        raise damaged(archive, "is not a file")
    if archive.stat().st_size > MOST_BYTES:
        size = f"{archive.stat().st_size:,} bytes, more than {MOST_BYTES:,}"
        raise damaged(archive, f"has {size}")
    try:
        with gzip.open(archive) as stream:
            content = stream.read(MOST_BYTES + 1)  # read to the end: the checksum is there
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise damaged(archive, f"is not a complete tar.gz archive ({error})") from error
    if len(content) > MOST_BYTES:
        raise damaged(archive, f"unpacks to more than {MOST_BYTES:,} bytes")
    with whole(archive), tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        entries = [
            (PurePosixPath(entry.name).name, entry)
            for entry in tar
            if entry.isreg() and PurePosixPath(entry.name).name in MEMBERS
        ]
    if not entries:
        raise damaged(archive, "holds no file of CIFAR-10 or CIFAR-100")
    names = dict(entries)
    for name, entry in entries:
        if names[name] is not entry:
            raise damaged(archive, f"holds {name} twice: {entry.name}, {names[name].name}")
        if entry.size > MOST_OF_A_FILE:  # a sparse file needs no space in the archive
            size = f"{entry.size:,} bytes, more than {MOST_OF_A_FILE:,}"
            raise damaged(archive, f"{entry.name} has {size}")
    found = {}
    with whole(archive), tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for name, entry in entries:
            if (file := tar.extractfile(entry)) is not None:
                found[name] = file.read()
    return found


@contextlib.contextmanager
def whole(archive: Path) -> Iterator[None]:
    """Refuse an archive in which `tarfile` finds an error."""
    try:
        yield
    except Exception as error:  # the bytes of a damaged archive can raise anything
        raise damaged(archive, f"is not a complete tar.gz archive ({error})") from error


def check_images(path: Path, member: str, data: Any, labels: Any, classes: int) -> None:
    """Require N images and a list of N labels in [0, classes)."""
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072:
        got = getattr(data, "shape", type(data).__name__)
        raise damaged(path, f"{member}: data must be uint8[N, 3072], got {got}")
    if not isinstance(labels, list) or len(labels) != len(data):
        got = f"{len(labels)} labels" if isinstance(labels, list) else type(labels).__name__
        raise damaged(
            path, f"{member}: {len(data)} images need a list of equally many labels, got {got}"
        )
    for label in labels:
        if type(label) is not int or not 0 <= label < classes:
            raise damaged(path, f"{member}: label {label!r:.40} is not in [0, {classes})")


def unpickle(path: Path, member: str, pickled: bytes, keys: list[bytes]) -> list[Any]:
    """Return the content of a file under each of the keys."""
    try:
        puts = [int(at or 0) for code, at, _ in pickletools.genops(pickled) if code.name in PUTS]
        if max(puts, default=0) > len(pickled):  # Python would allocate a table of this size
            raise pickle.UnpicklingError(f"it numbers an object {max(puts)}")
        content = PlainUnpickler(io.BytesIO(pickled), encoding="bytes").load()
    except Exception as error:  # the bytes of a damaged pickle can raise anything
        raise damaged(path, f"{member} is not a pickle of plain data ({error})") from error
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            raise damaged(path, f"{member} has no {key}")
    return [content[key] for key in keys]


class PlainUnpickler(pickle.Unpickler):
    """Unpickler of built-in types and uint8 arrays only; other pickles could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a safe replacement of a function that Python 2 or 3 pickles arrays with."""
        allowed = {
            "numpy.core.multiarray._reconstruct": empty_array,
            "numpy._core.multiarray._reconstruct": empty_array,
            "numpy.ndarray": np.ndarray,
            "numpy.dtype": uint8,
            "_codecs.encode": str.encode,
        }
        if f"{module}.{name}" not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return allowed[f"{module}.{name}"]


def empty_array(*_: Any) -> np.ndarray:
    """Return an array; the pickle sets its shape and content later."""
    return np.empty(0, np.uint8)


def uint8(name: str | bytes, *_: Any) -> np.dtype:
    """Return the only dtype that CIFAR needs; a forged dtype could make numpy read other memory."""
    if name not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"arrays must have dtype 'u1', got {name!r}")
    return np.dtype(np.uint8)


def damaged(path: Path, problem: str) -> ValueError:
    """Return the error for a file that cannot be used."""
    return ValueError(f"{path}: {problem}. Download it again {WHERE}")


def write_digits(folder: str | Path) -> Path:
    """Write scikit-learn's 1797 digits, enlarged, as an archive in the form of CIFAR-10.

    1500 images are in the training batches, 297 in the test batch. The bytes are the same every
    time. An existing archive is kept; if `load` rejects it, its error is raised.

    Args:
        folder: Folder for `cifar-10-python.tar.gz`; created if it does not exist.

    Returns:
        The path of the archive.
    """
    archive = Path(folder) / CIFAR10.archive
    if archive.exists():
        load(archive)
        return archive
    archive.parent.mkdir(parents=True, exist_ok=True)
    files.write(archive, digits_archive())
    return archive


def digits_archive() -> bytes:
    """Return the bytes of the archive of digits."""
    pixels, labels = load_digits()
    order = np.random.default_rng(0).permutation(len(labels))
    pixels, labels = pixels[order].reshape(-1, 8, 8), labels[order]
    large = ndimage.zoom(pixels, (1, 4, 4), order=1, mode="nearest", grid_mode=True)
    gray = np.rint(np.asarray(large) * 255 / 16).astype(np.uint8).reshape(-1, 1024)
    contents: dict[str, dict] = {CIFAR10.meta: {CIFAR10.names: [b"%d" % n for n in range(10)]}}
    for number, member in enumerate((*CIFAR10.train, CIFAR10.test)):
        rows = slice(300 * number, 300 * (number + 1))  # the last one, the test batch, has 297
        contents[member] = {b"data": np.tile(gray[rows], 3), CIFAR10.labels: labels[rows].tolist()}

    archive = io.BytesIO()
    with (
        gzip.GzipFile("", "wb", fileobj=archive, mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w") as tar,
    ):
        for member, content in contents.items():
            pickled = pickle.dumps(content, protocol=2)
            entry = tarfile.TarInfo(f"{CIFAR10.folder}/{member}")
            entry.size = len(pickled)
            tar.addfile(entry, io.BytesIO(pickled))
    return archive.getvalue()


def with_label_noise(images: Images, share: float, classes: int, seed: int) -> Images:
    """Replace the labels of `round(share * N)` random images, each by a random other class."""
    check_classes(images, classes)
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), got {share}")
    generator = generator_of(seed, "noise")
    wrong = generator.choice(len(images.label), round(share * len(images.label)), replace=False)
    label = images.label.copy()
    label[wrong] = (label[wrong] + generator.integers(1, classes, len(wrong))) % classes
    return images._replace(label=label)


def long_tailed(images: Images, imbalance: float, classes: int, seed: int) -> Images:
    """Reduce the classes to exponentially falling sizes, as in https://arxiv.org/abs/1901.05555.

    Class i keeps at most n * imbalance^(-i / (classes - 1)) random images, rounded down but at
    least 1, where n is the size of the largest class. The images stay in order.
    """
    check_classes(images, classes)
    if not 1 <= imbalance < math.inf:
        raise ValueError(f"imbalance must be finite and at least 1, got {imbalance}")
    largest = np.bincount(images.label).max()
    sizes = largest / imbalance ** (np.arange(classes) / (classes - 1))
    kept = np.maximum(1, sizes.astype(int))[images.label]
    return take(images, ranks_in_class(images.label, generator_of(seed, "tail")) < kept)


def subset(images: Images, count: int, seed: int) -> Images:
    """Choose `count` random images, balanced over the classes if possible; they stay in order."""
    if not 1 <= count <= len(images.label):
        raise ValueError(f"count must be in [1, {len(images.label)}], got {count}")
    generator = generator_of(seed, "subset")
    ranks = ranks_in_class(images.label, generator)
    ties = generator.permutation(len(ranks))
    return take(images, np.sort(np.lexsort((ties, ranks))[:count]))


def check_classes(images: Images, classes: int) -> None:
    """Require at least 2 classes, and enough classes for the labels."""
    least = max(2, int(images.label.max()) + 1)
    if classes < least:
        raise ValueError(f"classes must be at least {least} for these labels, got {classes}")


def generator_of(seed: int, purpose: Literal["noise", "tail", "subset"]) -> np.random.Generator:
    """Return a generator per purpose, so that a seed chooses different images for each purpose."""
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    return np.random.default_rng([seed, *purpose.encode()])


def ranks_in_class(label: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return for each image how many images of its class precede it in a random order."""
    order = generator.permutation(len(label))
    ranks = np.empty_like(order)
    for number in np.unique(label):
        members = order[label[order] == number]
        ranks[members] = np.arange(len(members))
    return ranks


def take(images: Images, rows: np.ndarray) -> Images:
    """Return the images at the given positions, or under the given mask."""
    return Images(images.image[rows], images.label[rows])


def train_batches(
    images: Images,
    batch_size: int,
    *,
    seed: int,
    augment: Literal["none", "standard"],
    num_threads: int = 2,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Return an endless iterator of batches, in a new order every epoch.

    Every epoch is a permutation of all images. A batch may hold the end of an epoch and the start
    of the next, so that no image is lost. `get_state()` of the iterator is small and fits into
    JSON. `set_state` continues with exactly the same batches, including their augmentation.

    Args:
        images: The images to draw from.
        batch_size: Images in every batch; at most the number of images.
        seed: Determines order and augmentation; the number of threads does not matter.
        augment: "standard" shifts each image by up to 4 pixels in each direction, padded with
            black, and mirrors half of the images.
        num_threads: Threads that prepare batches in advance; with 0, each batch is prepared on
            demand.

    Returns:
        An iterator of {"image": uint8[B, 32, 32, 3], "label": int32[B], "index": int32[B]}, where
        `index` is the position in `images`.
    """
    if not 1 <= batch_size <= len(images.label):
        raise ValueError(f"batch_size must be in [1, {len(images.label)}], got {batch_size}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    if augment not in ("none", "standard"):
        raise ValueError(f'augment must be "none" or "standard", got {augment!r}')

    def gather(index: np.ndarray) -> dict[str, np.ndarray]:
        return take(images, index)._asdict() | {"index": index.astype(np.int32)}

    def augmented(batch: dict[str, np.ndarray], generator: np.random.Generator):
        return batch | {"image": crop_and_flip(batch["image"], generator)}

    # Only indices pass through grain one by one: it is faster to gather images a batch at a time.
    order = grain.MapDataset.range(len(images.label)).seed(seed).shuffle().repeat()
    batches = order.batch(batch_size, drop_remainder=True).map(gather)
    if augment == "standard":
        batches = batches.random_map(augmented)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads, PREFETCHED)))


def crop_and_flip(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Shift each image by up to `PADDING` pixels, padded with zeros, and mirror half of them."""
    around = (PADDING, PADDING)
    padded = np.pad(image, ((0, 0), around, around, (0, 0)))
    crops = np.lib.stride_tricks.sliding_window_view(padded, image.shape[1:], axis=(1, 2, 3))
    top, left = generator.integers(0, 2 * PADDING + 1, (2, len(image)))
    cropped = crops[np.arange(len(image)), top, left, 0]
    mirrored = generator.random(len(image)) < 0.5
    cropped[mirrored] = cropped[mirrored, :, ::-1]
    return cropped


def test_batches(images: Images, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Return all images once, in order, in batches {"image", "label", "weight"} of one shape.

    The last batch is padded with zeros. `weight`, float32[B], is 0 for padding and 1 elsewhere.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    arrays = images._asdict() | {"weight": np.ones(len(images.label), np.float32)}

    def batch(start: int) -> dict[str, np.ndarray]:
        rows = {name: array[start : start + batch_size] for name, array in arrays.items()}
        missing = batch_size - len(rows["label"])
        return {
            name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
            for name, array in rows.items()
        }

    return map(batch, range(0, len(images.label), batch_size))


def normalize(image: jax.Array | np.ndarray) -> jax.Array:
    """Convert uint8 images to float32; normalize by CIFAR-10's mean and deviation per channel."""
    if image.dtype != np.uint8:
        raise ValueError(f"image must be uint8, got {image.dtype}")
    mean, std = (jnp.broadcast_to(jnp.float32(of), image.shape) for of in (MEAN, STD))
    return (jnp.asarray(image, jnp.float32) / 255 - mean) / std
