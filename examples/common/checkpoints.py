"""Checkpoints of a run with orbax: training state and position in the data, both or neither."""

import contextlib
import functools
import hashlib
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from examples.common.files import SaveError, reason
from examples.common.versions import differences, versions

State = TypeVar("State")

MOST_OF_THE_REST = 2**26  # bytes that a checkpoint may have besides its arrays


class CheckpointError(ValueError):
    """A checkpoint from which this run cannot continue."""


class Checkpoints:
    """The checkpoints of one run, in a separate folder.

        with Checkpoints(folder, "cifar.py") as checkpoints:
            state, step = checkpoints.restore(state, batches)
            checkpoints.save(step, state, batches)

    Checkpoints are written in the background. A checkpoint gets its final name when it is complete.
    So a process that is killed at any moment leaves all earlier checkpoints intact. The end of the
    `with` block waits for the last checkpoint.

    If a checkpoint cannot be written, one line says so and training goes on: the next `save` tries
    again. If the last one could not be written, the end of the `with` block raises an error.

    Args:
        folder: Folder of the checkpoints; created if missing.
        of: Name of the script or training. A checkpoint of another one is refused.
        keep: How many of the newest checkpoints are kept.

    Raises:
        OSError: If the folder cannot be created or written.
        SaveError: From the end of the `with` block, if the last checkpoint could not be written.
    """

    def __init__(self, folder: Path, of: str, keep: int = 2):
        self.folder = Path(folder).absolute()
        self._about = {"of": of, "versions": versions()}
        self._trouble = ""  # why the last checkpoint could not be written
        self._step: int | None = None  # of the checkpoint that is being written
        _hide_tracebacks()
        handlers: Any = {
            "about": ocp.JsonCheckpointHandler(),
            "state": ocp.StandardCheckpointHandler(),
            "data": grain.checkpoint.CheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers=handlers,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._wait()
        with contextlib.suppress(Exception):  # what it could say has been said
            self._manager.close()
        if self._trouble and error is None:
            raise SaveError(self._trouble)

    def save(self, step: int, state: Any, batches: grain.DatasetIterator | None = None) -> None:
        """Start to save a pytree of arrays and the position of the data iterator.

        Args:
            step: Optimizer steps so far; if this step is already saved, nothing is written.
            state: The training state: parameters, optimizer state, statistics, random keys.
            batches: The iterator over the data, after its `step`-th batch; `None` if the state
                says where the data goes on.
        """
        self._wait()
        if step in self._manager.all_steps():
            return
        items: dict[str, Any] = {
            "about": ocp.args.JsonSave(self._about),
            "state": ocp.args.StandardSave(state),
        }
        if batches is not None:
            items["data"] = grain.checkpoint.CheckpointSave(batches)
        self._step = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:  # from the disk, by way of orbax or tensorstore
            self._tell(step, error)

    def fail(self, step: int, error: Exception) -> None:
        """Say that the checkpoint of `step` cannot be written, because of an error before it."""
        self._wait()
        self._tell(step, error)

    def _tell(self, step: int | None, error: Exception) -> None:
        """Say what failed, once until a checkpoint is written again."""
        code = re.search(r"os_error_code='(\d+)'", str(error))  # from tensorstore
        why = os.strerror(int(code[1])) if code else reason(error)
        for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished, ignore_errors=True)  # it may have filled the disk
        trouble = f"the checkpoint of step {step} could not be written to {self.folder} ({why})"
        if not self._trouble:
            text = (
                f"{trouble}; kept: {kept(self.folder)}; training goes on, the next save tries again"
            )
            tqdm.write(text, file=sys.stderr)
        self._trouble = trouble

    def _wait(self) -> None:
        """Wait for the checkpoint that is being written."""
        step, self._step = self._step, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # from the disk, by way of orbax or tensorstore
            self._tell(step, error)
        else:
            if step is not None and newest(self.folder) == step:
                self._trouble = ""

    def restore(
        self, state: State, batches: grain.DatasetIterator | None = None
    ) -> tuple[State, int]:
        """Return the newest checkpoint, or `state` and 0 if there is no checkpoint.

        Args:
            state: A state with the wanted structure, shapes, dtypes and shardings.
            batches: The iterator over the data, as in `save`; it moves to the saved position.

        Returns:
            The restored state and its step.

        Raises:
            CheckpointError: If the checkpoint belongs to another script, variant or shape (the
                message lists the differences), or if it cannot be read. Then nothing changes,
                neither on disk nor in `batches`.
        """
        self._wait()
        step = self._manager.latest_step()
        if step is None:
            return state, 0
        where = f"checkpoint {self.folder / str(step)}"
        items: dict[str, Any] = {"state": ocp.args.StandardRestore(state)}
        if batches is not None:
            items["data"] = grain.checkpoint.CheckpointRestore(batches)
        position: Any = None if batches is None else batches.get_state()
        since = ""
        try:
            self._check_size(step, state)
            if not (self.folder / str(step) / "about").is_dir():
                raise FileNotFoundError("it does not say what it is of: damaged, or of older code")
            only_about = ocp.args.Composite(about=ocp.args.JsonRestore())
            about = self._manager.restore(step, args=only_about)["about"]
            since = differences(about["versions"])
            if about["of"] != self._about["of"]:
                raise CheckpointError(
                    f"{where} is of {about['of']!s:.60}, this is {self._about['of']}"
                )
            saved = self._manager.item_metadata(step)["state"]
            if saved is None:
                raise FileNotFoundError("its state is not there")
            _check_same(where, _saved_arrays(saved.tree), _arrays(state))
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except CheckpointError as error:
            raise CheckpointError(f"{error}{since}") from error
        except Exception as error:  # from tensorstore, orbax or json: a broken file
            if batches is not None:
                batches.set_state(position)
            raise CheckpointError(
                f"{where} cannot be read ({type(error).__name__}: {reason(error)}){since}. Delete "
                "that folder to continue from the previous checkpoint"
            ) from error
        return restored["state"], step

    def _check_size(self, step: int, state: Any) -> None:
        """Refuse a checkpoint that is much larger than the state; orbax would read all of it."""
        files = (self.folder / str(step)).rglob("*")
        size = sum(path.stat().st_size for path in files if path.is_file())
        most = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + MOST_OF_THE_REST
        if size > most:
            raise ValueError(f"its {size:,} bytes are more than the {most:,} that the state needs")


def newest(folder: Path) -> int | None:
    """Return the step of the newest complete checkpoint in a folder, or `None`."""
    names = [path.name for path in folder.glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=None)


def kept(folder: Path) -> str:
    """Describe what a run can continue from."""
    step = newest(folder)
    return "no checkpoint" if step is None else f"the checkpoint of step {step}"


def fingerprint(tree: Any) -> str:
    """Return a hash of every bit of a pytree of arrays."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


@functools.cache
def _hide_tracebacks() -> None:
    """Hide those of a failed save: its error is raised too, and `Checkpoints` reports it.

    orbax logs the error in each of its threads, and asyncio logs it for each array. tensorstore
    raises another error where nobody can catch it: its event loop is closed already.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_not_of_orbax)
    hook = sys.unraisablehook

    def quiet_hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = quiet_hook


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    is_of_orbax = "orbax" in Path(record.pathname).parts
    return not is_of_orbax and "orbax" not in record.getMessage()


def _arrays(state: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of each array by its path; random keys count as their raw numbers."""

    def describe(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return tuple(leaf.shape), str(leaf.dtype)

    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {_name(path): describe(leaf) for path, leaf in leaves}


def _saved_arrays(metadata: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    leaves = jax.tree_util.tree_leaves_with_path(metadata)
    return {_name(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _check_same(where: str, saved: dict, wanted: dict) -> None:
    unequal = [
        f"{name}: saved {saved.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if unequal:
        more = f", and {len(unequal) - 3} more" if len(unequal) > 3 else ""
        raise CheckpointError(
            f"{where} belongs to another model, variant, base optimizer or batch: "
            f"{'; '.join(unequal[:3])}{more}"
        )
