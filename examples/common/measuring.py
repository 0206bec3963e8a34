"""Programs that are compiled together and timed in rounds; a row that fails stops no other."""

import math
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from examples.common import files

MOST_SECONDS = 180  # for all programs that are compiled together
WARM_UP = 3  # calls before anything is timed: a GPU records its launches in the first ones


def say(text: str) -> None:
    print(f"    {text}", flush=True)


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {files.reason(error)}"


def compile_all(lower: dict[Any, Callable[[], list[Any]]]) -> tuple[dict[Any, Any], dict[Any, str]]:
    """Return the programs of each key, and the reasons of those that failed.

    Each function returns lowered programs. XLA compiles without Python's lock. A program that is
    not ready after `MOST_SECONDS` counts as failed; its thread cannot be stopped.
    """
    start, programs, failed, waiting = time.perf_counter(), {}, {}, {}
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for key, function in lower.items():
            try:
                waiting[key] = [pool.submit(lowered.compile) for lowered in function()]
            except Exception as error:
                failed[key] = described(error)
        for key, futures in waiting.items():
            try:
                end = start + MOST_SECONDS
                programs[key] = [
                    future.result(max(0, end - time.perf_counter())) for future in futures
                ]
            except TimeoutError:
                failed[key] = f"not compiled within {MOST_SECONDS} s"
            except Exception as error:
                failed[key] = described(error)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    say(f"compiled {len(programs)} of {len(lower)} rows in {time.perf_counter() - start:.0f} s")
    return programs, failed


class Runner:
    """A step that is called again and again; `advance` takes one and returns its arrays."""

    def __init__(self, advance: Callable[[], Any], least: float, cycle: int = 1, settling: int = 0):
        self.advance = advance
        self.run(max(WARM_UP, settling))
        cycles = math.ceil(least / (cycle * self.run(cycle)))
        self.calls = cycle * cycles

    def run(self, calls: int) -> float:
        """Make some calls and return the seconds per call."""
        start = time.perf_counter()
        for _ in range(calls):
            result = self.advance()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    def seconds(self) -> float:
        """Take one measurement."""
        return self.run(self.calls)


def started(make: dict[str, Callable[[], Runner]]) -> tuple[dict[str, Runner], dict[str, str]]:
    """Return the runners, and the reasons of those that failed."""
    runners, failed = {}, {}
    for name, function in make.items():
        try:
            runners[name] = function()
        except Exception as error:
            failed[name] = described(error)
    return runners, failed


def in_rounds(
    measure: dict[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Take a measurement of each row in each round, in random order.

    Returns:
        The measurements of the rows that did not fail, and the reasons of the others.
    """
    shuffle, found, failed = random.Random(0), {name: [] for name in measure}, {}
    for _ in range(rounds):
        for name in shuffle.sample(sorted(found), len(found)):
            try:
                found[name].append(measure[name]())
            except Exception as error:
                failed[name] = described(error)
                del found[name]
    return found, failed


def time_of(seconds: list[float], reference: list[float] | None) -> dict[str, Any]:
    """Return a row's times, and their ratio to those of a reference in the same rounds."""
    row = {"ms": 1e3 * float(np.median(seconds)), "seconds": seconds, "ratio": None}
    if reference is not None:
        row["ratio"] = np.quantile(np.divide(seconds, reference), [0.25, 0.5, 0.75]).tolist()
    return row
