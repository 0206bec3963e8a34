"""A Ray cluster that ends when its standard input does; a process without jax runs this file.

Ray forks, which a process with jax's threads should not. And whatever ends the process at the other
end of the pipe, no other is left behind.
"""

import logging
import os
import sys
import tempfile

LEAST_BYTES, LARGEST_SHARE = 200_000_000, 0.3


def main() -> None:
    """Start with room for so many bytes of messages, tell the address, wait, end."""
    import ray

    # Ray's default is a part of all memory, and each page of it costs time when it is first used.
    # A small store uses the same pages again.
    num_bytes = max(LEAST_BYTES, int(sys.argv[1]))
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        num_bytes = min(num_bytes, int(LARGEST_SHARE * memory))  # what is beyond goes to the disk
    # A folder of its own, so that nobody else's `ray.init()` finds this cluster. Ray's sockets need
    # short paths, which the temporary folders of some systems are not.
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
        print(f"address {ray.get_runtime_context().gcs_address}", flush=True)
        sys.stdin.read()
        ray.shutdown()


if __name__ == "__main__":
    main()
