"""A Ray cluster that ends when its standard input ends; a process without jax runs this file.

Ray forks, which a process with jax's threads should not do. And no process is left behind, however
the process at the other end of the pipe ends. If one of Ray's own servers ends, all of the cluster
ends, because calls to it could wait for minutes.
"""

import logging
import os
import select
import sys
import tempfile

LEAST_BYTES, LARGEST_SHARE = 200_000_000, 0.3
SERVERS = ("gcs_server", "raylet")
POLL = 0.2  # seconds between two looks at the servers


def main() -> None:
    """Start the cluster, print its address, wait for the end of standard input, and end.

    The first argument of the command line is the number of bytes of messages to make room for.
    """
    import ray

    # Ray's default store is a share of all memory, and each page costs time when it is first used.
    # A small store uses the same pages again.
    num_bytes = max(LEAST_BYTES, int(sys.argv[1]))
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        num_bytes = min(num_bytes, int(LARGEST_SHARE * memory))  # the rest goes to the disk
    # A separate folder, so that no other program's `ray.init()` finds this cluster. Ray's sockets
    # need short paths, and the temporary folders of some systems have long ones.
    parent = None if sys.platform == "win32" else "/tmp"
    with tempfile.TemporaryDirectory("", "samx-", parent, ignore_cleanup_errors=True) as folder:
        ray.init(
            "local",
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            object_store_memory=num_bytes,
            _temp_dir=folder,
        )
        print(f"address {ray.get_runtime_context().gcs_address} {folder}", flush=True)
        servers_live = watch()
        while servers_live():
            if select.select([sys.stdin], [], [], POLL)[0]:
                ray.shutdown()
                return
    os._exit(1)  # a call to Ray could wait for the server that has ended


def watch():
    """Return a function that says whether Ray's servers live, as far as that can be seen."""
    try:
        import psutil  # Ray brings a copy
    except ImportError:
        return lambda: True
    servers = [process for process in psutil.Process().children() if process.name() in SERVERS]
    return lambda: all(
        process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in servers
    )


if __name__ == "__main__":
    main()
