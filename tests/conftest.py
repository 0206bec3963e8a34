"""Settings of every test: 8 simulated devices, fast compilation, and a cache of compiled programs.

float64 only where a test asks for it.
"""

import collections
import contextlib
import functools
import gc
import itertools
import mmap
import os
import shutil
import signal
import threading
import zlib
from pathlib import Path

import jax
import jaxlib
import psutil
import pytest
from jax._src import compilation_cache
from jax._src.interpreters import mlir
from processor import can_run

# Most of the time of these tests went into compiling. These flags take most of that away: no
# optimization, XLA's older and faster emitters, and one module for LLVM instead of many. Flags that
# the user has set come later, so they win. The processes that tests start get the same flags.
FAST_COMPILATION = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}
# Bytes by which a process may grow before it drops its compiled programs, which takes seconds.
MOST_MEMORY = max(2e9, psutil.virtual_memory().total / 6)
LARGEST_CACHE = 1e9  # bytes of all compiled programs on the disk


def pytest_addoption(parser):
    group = parser.getgroup("samx")
    group.addoption("--costs", action="store_true", help="print the processor seconds of each room")
    group.addoption("--every", type=int, default=1, metavar="N", help="run every N-th test only")


def pytest_collection_modifyitems(config, items):
    items[:] = items[:: config.getoption("--every")]
    if not hasattr(jax, "pmap"):  # a later JAX may drop it
        for item in items:
            if "pmap" in item.name.partition("[")[2]:  # among the values of its parameters
                item.add_marker(pytest.mark.skip("this JAX has no pmap"))


@pytest.hookimpl(wrapper=True)
def pytest_collect_file():
    """Do not search the modules of this folder for examples in docstrings: there are none."""
    collectors = yield
    return [collector for collector in collectors if type(collector) is pytest.Module]


def pytest_configure(config):
    config.pluginmanager.register(Doctests())  # they are outside of this folder
    if config.getoption("--costs"):  # to ask for the processor's time costs some of it
        config.pluginmanager.register(Costs())


class Doctests:
    """Skip those that the processor cannot run."""

    def pytest_runtest_setup(self, item):
        if isinstance(item, pytest.DoctestItem):
            code = "".join(example.source for example in item.dtest.examples)
            if not can_run(code):
                pytest.skip("XLA has no float16 for this processor")


def processor_seconds():
    """Return what this process and those that it started and that have ended have computed."""
    return sum(os.times()[:4])


class Costs:
    """Note in each report what was computed since the one before; sum it up by rooms."""

    def __init__(self):
        self.seen = processor_seconds()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self):
        report = (yield).get_result()
        now = processor_seconds()
        report.processor_seconds, self.seen = now - self.seen, now

    def pytest_terminal_summary(self, terminalreporter):
        costs, tests = collections.Counter(), collections.Counter()
        for report in itertools.chain(*terminalreporter.stats.values()):
            if hasattr(report, "processor_seconds"):
                room = report.nodeid.split("::")[0].removeprefix("tests/").split("/")[0]
                costs[room] += report.processor_seconds
                tests[room] += report.when == "call"
        for room, seconds in costs.most_common():
            terminalreporter.write_line(f"{seconds:8.1f} s {tests[room]:6} tests  {room}")
        terminalreporter.write_line(f"{costs.total():8.1f} s {tests.total():6} tests")


def known_flags(flags):
    """Return those that this jaxlib has; XLA ends the process at a flag that it does not know."""
    (library,) = Path(jaxlib.__file__).parent.glob("libjax_common.*")
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return {f: value for f, value in flags.items() if text.find(f"\0{f}\0".encode()) >= 0}


fast = " ".join(f"--{flag}={value}" for flag, value in known_flags(FAST_COMPILATION).items())
os.environ["XLA_FLAGS"] = f"{fast} {os.environ.get('XLA_FLAGS', '')}"
gc.set_threshold(100_000, 50, 100)  # tracing makes many objects that stay for a while
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "warn")  # pytest turns every warning into an error
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts `pytest &`
    # The processes that tests start would ignore it too, and never be stopped by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Contexts(threading.local):
    """The MLIR context in which all programs of a thread are lowered, until it is dropped.

    JAX makes a new one for each program. That takes 4 ms, as long as most of what an eager call of
    a primitive takes otherwise.
    """

    # Private: another JAX may not have it.
    make = staticmethod(getattr(mlir, "make_ir_context", None))
    context = None

    def get(self):
        if self.context is None:
            self.context = self.make()
        return self.context


contexts = Contexts()
if contexts.make is not None:
    mlir.make_ir_context = lambda: contexts.get()


class FastCompression:
    """Stands in for zlib where JAX writes its cache: three times as fast, files a fifth larger."""

    compress, decompress = functools.partial(zlib.compress, level=1), zlib.decompress


if hasattr(compilation_cache, "zlib"):  # private too
    compilation_cache.zlib = FastCompression


def pytest_collection_finish():
    """Leave what was imported until now out of all garbage collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(request, tmp_path_factory):
    """Keep compiled programs in a fixed folder, from which the next run takes them.

    JAX's files may be read before they are written to the end. So each worker has a folder of its
    own, and links to the files of the others.
    """
    kept = request.config.rootpath / ".pytest_cache" / "compiled_programs"
    kept.mkdir(parents=True, exist_ok=True)
    own = tmp_path_factory.mktemp("compiled_programs")
    if sum(file.stat().st_size for file in kept.iterdir()) > LARGEST_CACHE:
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(own))
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # their path is in the key
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    jax.devices()  # create all 8 devices before an example asks for fewer
    return own, kept


@pytest.fixture(scope="module", autouse=True)
def shared_programs(compiled_programs):
    """Take what other workers have compiled, and give them what this one has."""
    own, kept = compiled_programs
    link_new(kept, own)
    yield
    link_new(own, kept)
    gc.collect(1)
    gc.freeze()  # a full collection, which some scripts ask for, would look at all that is alive


def link_new(source, target):
    """Link every file of `source` into `target`, but for those that are in both already."""
    new = set(os.listdir(source)) - linked
    for name in new:
        with contextlib.suppress(OSError):  # no links here, or another worker was faster
            os.link(source / name, target / name)
    linked.update(new)


linked = set()  # names of the files that are in both folders: to list thousands takes 10 ms


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def free_memory():
    """Drop compiled programs if many came; they would hold gigabytes until the end."""
    yield
    global held, contexts
    if this_process.memory_info().rss > held + MOST_MEMORY:
        jax.clear_caches()
        contexts = Contexts()
        held = this_process.memory_info().rss


this_process = psutil.Process()
held = 0  # bytes of this process after it last dropped its programs
