import gc
import os
import sys
import tempfile
from importlib.metadata import version

# Most of the suite's time is compilation: XLA does it fast rather than well, unless told otherwise
# (XLA_FLAGS= pytest compiles as users' programs are compiled).
FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",  # small programs are not worth several modules of code
]
if version("jax").startswith("0.10."):  # later versions stop at flags they do not know, as this one
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

import jax  # noqa: E402
import pytest  # noqa: E402

# Tracing makes many objects and little garbage: it is collected more rarely than by default.
gc.set_threshold(100_000, 50, 50)

# Before anything else uses JAX: the suite runs on four CPU devices, also on a machine with one core.
jax.config.update("jax_num_cpu_devices", 4)

# These scripts need PyTorch, other libraries and the reference programs
collect_ignore = ["golden", "conformance"]


def pytest_configure(config):
    """The workers, and the programs they start again and again, compile what they share once."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        directory = tempfile.TemporaryDirectory(prefix="jax-cache-", ignore_cleanup_errors=True)
        config.add_cleanup(directory.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = directory.name  # the workers inherit it
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def run(request, capsys, monkeypatch):
    """Runs the test module's EXPERIMENT in this process: (exit status, stdout, stderr).

    The command line is the module's SMALL, or ``small``, and the arguments.
    """

    from harness import runs  # the tests of the library run where there is no harness

    def run(*arguments, small=request.module.SMALL):
        experiment = request.module.EXPERIMENT
        monkeypatch.setattr(sys, "argv", [experiment.__file__, *small, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            runs.run_main(experiment.main)
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return run


@pytest.fixture
def check_refused(run, tmp_path):
    """Checks that the experiment refuses options in one line with a message, before it writes anything."""

    def check_refused(options, message, *, written=False, **keywords):
        out = tmp_path / "run"
        status, _, error = run(*options.split(), "--out", out, **keywords)
        assert status == 2
        assert error.startswith("error: ")
        assert message in error
        assert len(error.strip().splitlines()) == 1
        assert written or not out.exists()

    return check_refused
