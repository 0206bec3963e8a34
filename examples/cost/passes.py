"""Count what a step does at run time: passes through the loss, and branches taken."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp


class Counter:
    """Count the passes through a loss while a program runs; `size` examples are one pass."""

    def __init__(self, size: int):
        self.size = size
        self.examples = {"forward": [], "backward": []}

    def clear(self) -> None:
        """Reset the counts."""
        jax.effects_barrier()
        for seen in self.examples.values():
            seen.clear()

    def passes(self) -> dict[str, float]:
        """Return the forward and backward passes since `clear`."""
        jax.effects_barrier()
        return {direction: sum(seen) / self.size for direction, seen in self.examples.items()}

    def watch(self, losses_fn: Callable) -> Callable:
        """Return the same losses, with a callback in each direction."""

        def note(direction, losses, *_):
            self.examples[direction].append(losses.shape[0])

        @jax.custom_vjp
        def watched(losses):
            jax.debug.callback(functools.partial(note, "forward"), losses)
            return losses

        def forward(losses):
            return watched(losses), losses

        def backward(losses, cotangent):
            # Pass the losses too: two vectorized passes may share a cotangent but count as two.
            jax.debug.callback(functools.partial(note, "backward"), losses, cotangent)
            return (cotangent,)

        watched.defvjp(forward, backward)
        return lambda params, batch: watched(losses_fn(params, batch))


class Forks:
    """Observe the outermost `cond`s and `switch`es of a step whose branches call the loss.

    These are the forks. All others stay unchanged, for example the bookkeeping of a policy.
    """

    def __init__(self):
        self.calls = 0  # of the loss, during tracing
        self.number = 0  # of branches in the last trace; 0 without a fork
        self.taken = []  # the branch of each step that ran under `counted`

    def watch(self, losses_fn: Callable) -> Callable:
        """Return the same losses, and count their calls; the calls show which forks matter."""

        def called(params, batch):
            self.calls += 1
            return losses_fn(params, batch)

        return called

    def number_in(self, step: Callable, *args: Any) -> int:
        """Return the number of branches of the step."""
        with self._traced(jax.lax.switch):
            jax.eval_shape(lambda *args: step(*args), *args)  # a new function has no cached trace
        return self.number

    @contextlib.contextmanager
    def only(self, choice: int) -> Iterator[None]:
        """Trace only one of the branches. Forks in sequence are assumed to choose alike."""

        def chosen(index, branches, *operands):
            del index
            return branches[min(choice, len(branches) - 1)](*operands)

        with self._traced(chosen):
            yield

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Record in `taken` which branch a step takes at its first fork while the program runs."""
        switch, self.taken = jax.lax.switch, []

        def noted(index, branches, *operands):
            if not self.number:
                jax.debug.callback(lambda i: self.taken.append(int(i)), index)
            return switch(index, branches, *operands)

        with self._traced(noted):
            yield

    @contextlib.contextmanager
    def _traced(self, at_fork: Callable) -> Iterator[None]:
        """Call `at_fork(index, branches, *operands)` in place of each fork."""
        cond, switch, is_inside = jax.lax.cond, jax.lax.switch, False
        self.number = 0

        def calls_the_loss(branches, operands):
            before = self.calls
            for branch in branches:
                jax.eval_shape(lambda *xs, branch=branch: branch(*xs), *operands)
            return self.calls > before

        def outermost(plain, index, branches, operands):
            nonlocal is_inside
            if is_inside:
                return plain()
            is_inside = True
            try:
                if not calls_the_loss(branches, operands):
                    return plain()
                result = at_fork(index, branches, *operands)
                self.number = max(self.number, len(branches))
            finally:
                is_inside = False
            return result

        def any_cond(pred, true_fun, false_fun, *operands):
            plain = functools.partial(cond, pred, true_fun, false_fun, *operands)
            index = jnp.asarray(pred).astype(jnp.int32)
            return outermost(plain, index, (false_fun, true_fun), operands)

        def any_switch(index, branches, *operands):
            plain = functools.partial(switch, index, branches, *operands)
            index = jnp.clip(index, 0, len(branches) - 1)
            return outermost(plain, index, branches, operands)

        with (
            mock.patch.object(jax.lax, "cond", any_cond),
            mock.patch.object(jax.lax, "switch", any_switch),
        ):
            yield
