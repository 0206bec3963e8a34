"""Settings of every test: 8 simulated devices; float64 only where a test asks for it."""

import gc
import signal

import jax
import pytest

gc.set_threshold(100_000, 50, 100)  # tracing makes many objects that stay for a while
jax.config.update("jax_num_cpu_devices", 8)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts `pytest &`
    # The processes that tests start would ignore it too, and never be stopped by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_numpy_rank_promotion", "warn")  # pytest turns every warning into an error


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Share compiled programs between the tests of a worker; many tests compile the same ones."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    jax.devices()  # create all 8 devices before an example asks for fewer


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def fast_compilation():
    """Compile faster, for programs that take longer to compile than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def free_memory():
    """Drop compiled programs after each module; they would hold gigabytes until the end."""
    yield
    jax.clear_caches()
