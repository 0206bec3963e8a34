"""Run data_parallel.py in several processes on this machine, which train together.

    python examples/devices/multi_process.py
    python examples/devices/multi_process.py --processes 4 --devices 1 --strategy jit

Every process has its own simulated devices. Process 0 writes to the terminal. The stderr output of
the other processes appears after their number. All other arguments go to data_parallel.py.

If one process dies, the others are stopped. Ctrl-C stops all of them. Try it: the process ids are
printed at the start.
"""

import argparse
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

WORKER = Path(__file__).with_name("data_parallel.py")
SET_HERE = ("--coordinator", "--num-processes", "--process-id")
GRACE = 5  # seconds from SIGTERM to SIGKILL


def free_port() -> int:
    """Return a port that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    """Return our environment without device settings: the workers simulate their devices."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if "host_platform_device_count" not in flag]
    env = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    return env | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}


def start(number: int, command: list[str]) -> subprocess.Popen:
    """Start one worker in its own session: Ctrl-C reaches only us, and we stop the worker."""
    quiet = number > 0
    return subprocess.Popen(
        [*command, "--process-id", str(number)],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if quiet else None,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def watch(number: int, worker: subprocess.Popen, events: queue.SimpleQueue) -> None:
    """Forward the worker's stderr; when the worker has ended, put its number into the queue."""
    for line in worker.stderr or ():
        print(f"process {number}: {line}", end="", file=sys.stderr, flush=True)
    worker.wait()
    events.put(number)


def stop(workers: list[subprocess.Popen]) -> None:
    """Stop all workers that still run, in bounded time."""
    for worker in workers:
        worker.terminate()
    deadline = time.monotonic() + GRACE
    for worker in workers:
        try:
            worker.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def supervise(workers: list[subprocess.Popen], events: queue.SimpleQueue) -> tuple[int, str]:
    """Wait for all workers; stop them all if one fails or a signal arrives.

    Returns:
        The exit code, and a message that says what went wrong.
    """
    for _ in workers:
        event = events.get()
        if isinstance(event, signal.Signals):
            stop(workers)
            return 128 + event, f"{event.name}: stopped all processes"
        code = workers[event].returncode
        if code:
            stop(workers)
            how = f"ended with exit code {code}"
            if code < 0:
                how = f"was killed by {signal.Signals(-code).name}"
            return 1, f"process {event} {how}; stopped the others"
    return 0, ""


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return our own arguments, and the arguments of the workers."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2, help="simulated devices in each process")
    args, others = parser.parse_known_args(argv)
    for name in ("processes", "devices"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    for argument in others:
        if argument.split("=")[0] in SET_HERE:
            parser.error(f"{argument} is not for you to set: every process gets its own")
    return args, others


def main(argv: list[str] | None = None) -> int:
    args, others = parse(argv)
    # The handler only records the signal: nothing is interrupted, and a second Ctrl-C is harmless.
    events = queue.SimpleQueue()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: events.put(signal.Signals(number)))

    command = [sys.executable, str(WORKER), *others, "--devices", str(args.devices)]
    command += ["--coordinator", f"127.0.0.1:{free_port()}"]
    command += ["--num-processes", str(args.processes)]
    workers = [start(number, command) for number in range(args.processes)]
    pids = [f"process {number}: pid {worker.pid}" for number, worker in enumerate(workers)]
    print(", ".join(pids), flush=True)
    watchers = [
        threading.Thread(target=watch, args=(number, worker, events))
        for number, worker in enumerate(workers)
    ]
    for watcher in watchers:
        watcher.start()
    code, trouble = supervise(workers, events)
    for watcher in watchers:
        watcher.join()
    if trouble:
        print(f"\n{trouble}", file=sys.stderr)  # on a separate line, below the progress bar
    return code


if __name__ == "__main__":
    sys.exit(main())
