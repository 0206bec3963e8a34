"""Where an example writes its results: a folder of its own, never over an earlier run."""

import itertools
from pathlib import Path


def free_folder(out: str | None, name: str) -> Path:
    """Create and return the folder `out`, or else the first free `runs/<name>-NNN`.

    Args:
        out: A folder that does not exist yet or is empty; `None` chooses one.
        name: What the runs are called, in the folder that is chosen.

    Returns:
        The folder, which exists and is empty.

    Raises:
        ValueError: If `out` holds something already, or is no folder.
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
