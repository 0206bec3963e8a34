"""A cluster of Ray on this machine alone, which ends with this process."""

import contextlib
import importlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PATIENCE = 120.0  # seconds for the cluster to start
END_PATIENCE = 30.0  # seconds for the cluster to end by itself
CLUSTER = Path(__file__).with_name("_ray_cluster.py")
# One token for the whole process, because Ray in this process remembers the first one.
TOKEN = secrets.token_hex(32)
SETTINGS = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listen on the loopback interface only
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^A worker died or was killed",  # `train` reports it in one line
    "RAY_AUTH_MODE": "token",  # keeps out other users of this machine
    "RAY_AUTH_TOKEN": TOKEN,
}


class LocalCluster:
    """A cluster that listens on the loopback interface only, and asks for a token.

    A process without jax holds it, see `_ray_cluster`.

    Attributes:
        address: HOST:PORT of the cluster.
        pid: The process that holds it.
    """

    def __init__(self, num_bytes: int):
        self._undo = contextlib.ExitStack()
        self._undo.enter_context(environment(SETTINGS))
        with tempfile.TemporaryFile() as errors:
            self._holder = holder = subprocess.Popen(
                [sys.executable, "-P", str(CLUSTER), str(num_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C must reach this process only
            )
            self.pid = holder.pid
            assert holder.stdout is not None
            timer = threading.Timer(PATIENCE, holder.kill)
            timer.start()
            self._folder, words = None, []
            try:
                words = holder.stdout.readline().decode().split()
            finally:
                timer.cancel()
                if len(words) != 3:
                    self.end()
            if len(words) != 3:
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip()
                raise RuntimeError(f"Ray: no cluster could be started on this machine:\n{said}")
            _, self.address, self._folder = words

    @property
    def has_ended(self) -> bool:
        """Whether the cluster has ended."""
        return self._holder.poll() is not None

    def end(self) -> None:
        """End the cluster, and what its holder may have left."""
        holder = self._holder
        for pipe in (holder.stdin, holder.stdout):
            if pipe is not None:
                pipe.close()
        try:
            holder.wait(END_PATIENCE)
        except subprocess.TimeoutExpired:
            holder.kill()
            holder.wait()
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(holder.pid, signal.SIGKILL)  # the holder leads a group of its own
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._undo.close()


@contextlib.contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while, which Ray reads at once."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    _reread()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        _reread()


def _reread() -> None:
    """Make Ray read the environment again, in case it was imported before."""
    with contextlib.suppress(ImportError, AttributeError):  # other versions store it elsewhere
        constants: Any = importlib.import_module("ray._private.ray_constants")
        raylet: Any = importlib.import_module("ray._raylet")
        constants.ENABLE_RAY_CLUSTER = constants.env_bool(
            constants.ENABLE_RAY_CLUSTERS_ENV_VAR, not constants.IS_WINDOWS_OR_OSX
        )
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
