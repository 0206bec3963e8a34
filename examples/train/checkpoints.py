"""Checkpoints of a run with orbax: training state and position in the data, both or neither."""

from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

State = TypeVar("State")


class CheckpointError(ValueError):
    """A checkpoint from which this run cannot continue."""


class Checkpoints:
    """The checkpoints of one run, in a separate folder.

        with Checkpoints(folder) as checkpoints:
            state, step = checkpoints.restore(state, batches)
            checkpoints.save(step, state, batches)

    Checkpoints are written in the background. A checkpoint gets its final name when it is complete.
    So a process that is killed at any moment leaves all earlier checkpoints intact. The end of the
    `with` block waits for the last checkpoint.

    Args:
        folder: Folder of the checkpoints; created if missing.
        keep: How many of the newest checkpoints are kept.

    Raises:
        OSError: If the folder cannot be created or written.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        handlers: Any = {
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
        self._manager.close()

    def save(self, step: int, state: Any, batches: grain.DatasetIterator) -> None:
        """Start to save a pytree of arrays and the position of the data iterator.

        Args:
            step: Optimizer steps so far; if this step is already saved, nothing is written.
            state: The training state: parameters, optimizer state, statistics, random keys.
            batches: The iterator over the data, after its `step`-th batch.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(batches)
        )
        self._manager.save(step, args=items, force=True)

    def restore(self, state: State, batches: grain.DatasetIterator) -> tuple[State, int]:
        """Return the newest checkpoint, or `state` and 0 if there is no checkpoint.

        Args:
            state: A state with the wanted structure, shapes, dtypes and shardings.
            batches: The iterator over the data; it moves to the saved position.

        Returns:
            The restored state and its step.

        Raises:
            CheckpointError: If the checkpoint belongs to another variant or shape (the message
                lists the differences), or if it cannot be read. Then nothing changes, neither on
                disk nor in `batches`.
        """
        self._manager.wait_until_finished()
        step = self._manager.latest_step()
        if step is None:
            return state, 0
        where = f"checkpoint {self.folder / str(step)}"
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(state), data=grain.checkpoint.CheckpointRestore(batches)
        )
        position = batches.get_state()
        try:
            saved = self._manager.item_metadata(step)["state"]
            if saved is None:
                raise FileNotFoundError("its state is not there")
            _check_same(where, _saved_arrays(saved.tree), _arrays(state))
            restored = self._manager.restore(step, args=items)
        except CheckpointError:
            raise
        except Exception as error:  # from tensorstore, orbax or json: a broken file
            batches.set_state(position)
            reason = str(error).strip().split("\n")[0][:300]
            raise CheckpointError(
                f"{where} cannot be read ({type(error).__name__}: {reason}). Delete that folder to "
                "continue from the previous checkpoint"
            ) from error
        return restored["state"], step


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
    differences = [
        f"{name}: saved {saved.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise CheckpointError(
            f"{where} belongs to another model, variant, base optimizer or batch: "
            f"{'; '.join(differences[:3])}{more}"
        )
