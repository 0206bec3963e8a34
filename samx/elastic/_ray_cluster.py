"""A Ray cluster that ends when its standard input ends; a process without jax runs this file.

Ray forks, which a process with jax's threads should not do. And nothing is left behind, however
the process at the other end of the pipe ends. If one of Ray's own servers ends, the whole cluster
ends, because calls to it could wait for minutes.
"""

import logging
import os
import select
import shutil
import sys
import tempfile
import time
import traceback

import psutil

LEAST_BYTES, LARGEST_SHARE = 200_000_000, 0.3
SERVERS = ("gcs_server", "raylet")
POLL = 0.2  # seconds between two looks at the servers
PATIENCE = 10.0  # seconds for processes to end, and for the folder to be removed


def main() -> None:
    """Start the cluster, print its address and folder, wait for an end, and leave nothing.

    The first argument of the command line is the number of bytes of messages to make room for.
    """
    # A separate folder, so that no other program's `ray.init()` finds this cluster. Ray's sockets
    # need short paths, and the temporary folders of some systems have long ones.
    parent = None if sys.platform == "win32" else "/tmp"
    folder, code = tempfile.mkdtemp("", "samx-", parent), 1
    try:
        serve(folder, int(sys.argv[1]))
        code = 0
    except BaseException:  # such as a broken pipe, if the other process has ended meanwhile
        traceback.print_exc()
    finally:
        end(folder)
        os._exit(code)  # Ray's own clean-up could wait for a server that has ended


def serve(folder: str, num_bytes: int) -> None:
    """Run the cluster until standard input or one of Ray's servers ends."""
    import ray

    # Ray's default store is a share of all memory, and each page costs time when it is first used.
    # A small store uses the same pages again.
    num_bytes = max(LEAST_BYTES, num_bytes)
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        num_bytes = min(num_bytes, int(LARGEST_SHARE * memory))  # the rest goes to the disk
    ray.init(
        "local",
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=num_bytes,
        _temp_dir=folder,
    )
    print(f"address {ray.get_runtime_context().gcs_address} {folder}", flush=True)
    servers = [process for process in psutil.Process().children() if process.name() in SERVERS]
    while all(map(is_alive, servers)):
        if select.select([sys.stdin], [], [], POLL)[0]:
            return


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(folder: str) -> None:
    """Kill all processes of the cluster, and then remove its folder."""
    processes = psutil.Process().children(recursive=True)
    for process in processes:  # parents first, so that they start no others
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while os.path.exists(folder) and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
