"""Choose the folder for the results of an example, and keep other runs out of it."""

import argparse
import itertools
from pathlib import Path

from filelock import FileLock, Timeout

from examples.common.arguments import refuse

LOCK = ".lock"  # the file that is locked; it stays, and means nothing after its run has ended

_held: list[FileLock] = []  # until this process ends, however it ends


def choose_folder(args: argparse.Namespace, name: str) -> None:
    """Set and lock `args.folder`: --resume, --out or a new one; call it after all other checks."""
    option = "--out" if getattr(args, "resume", None) is None else "--resume"
    try:
        if option == "--out":
            args.folder = free_folder(args.out, name)
        else:
            args.folder = Path(args.resume)
            lock(args.folder)
    except (OSError, ValueError) as error:
        refuse(f"{option}: {error}")


def free_folder(out: str | None, name: str) -> Path:
    """Create and lock the folder `out`, or the first free `runs/<name>-NNN` if `out` is `None`.

    Args:
        out: A folder that does not exist yet or is empty; if `None`, a folder is chosen.
        name: First part of the name of a chosen folder.

    Returns:
        The folder, which exists and is empty but for its lock.

    Raises:
        ValueError: If `out` is not empty, is not a folder, or is used by another run.
    """
    if out is not None:
        folder = Path(out)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        folder.mkdir(parents=True, exist_ok=True)
        _check_empty(folder)  # before a file is created in a folder of something else
        lock(folder)
        _check_empty(folder)  # another run may have ended in the meantime
        return folder
    for number in itertools.count(1):
        folder = Path("runs") / f"{name}-{number:03d}"
        try:
            folder.mkdir(parents=True)  # fails if another run was faster
        except FileExistsError:
            continue
        lock(folder)
        return folder
    raise AssertionError("there is always a next number")


def hold_results(args: argparse.Namespace) -> None:
    """Create and lock the folder `args.results`, to which a script adds what is missing."""
    try:
        args.results.mkdir(parents=True, exist_ok=True)
        lock(args.results)
    except (OSError, ValueError) as error:
        refuse(f"--results: {error}")


def lock(folder: Path) -> None:
    """Keep other processes out of a folder until this process ends, also if it is killed.

    Raises:
        ValueError: If another process has locked the folder.
    """
    # One lock for each folder and process, so that a process can resume its own run.
    held = FileLock(folder.resolve() / LOCK, is_singleton=True, thread_local=False)
    try:
        held.acquire(blocking=False)
    except Timeout:
        raise ValueError(f"{folder} is used by another run") from None
    _held.append(held)


def _check_empty(folder: Path) -> None:
    if any(path.name != LOCK for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty; choose another folder")
