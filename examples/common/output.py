"""Choose the folder for the results of an example, so that no earlier run is overwritten."""

import itertools
from pathlib import Path


def free_folder(out: str | None, name: str) -> Path:
    """Create and return the folder `out`, or the first free `runs/<name>-NNN` if `out` is `None`.

    Args:
        out: A folder that does not exist yet or is empty; if `None`, a folder is chosen.
        name: First part of the name of a chosen folder.

    Returns:
        The folder, which exists and is empty.

    Raises:
        ValueError: If `out` is not empty, or is not a folder.
    """
    if out is not None:
        folder = Path(out)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    numbered = (Path("runs") / f"{name}-{number:03d}" for number in itertools.count(1))
    folder = next(candidate for candidate in numbered if not candidate.exists())
    folder.mkdir(parents=True)
    return folder
