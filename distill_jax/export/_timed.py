"""Times an exported file in a process of its own, which loads neither this library nor the network's code.

``python -P _timed.py FILE INPUTS.npz THREADS SECONDS`` prints one line of JSON. The inputs are in the order
of the file's.
"""

import json
import os
import sys
import time
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np


def main(path: str, inputs: str, threads: int, seconds: float) -> None:
    """Loads the file, calls it until the time is over, and prints what a call takes."""
    with np.load(inputs) as file:
        arrays = [file[f"arr_{i}"] for i in range(len(file.files))]
    start = time.perf_counter()
    call, runtime = (program if zipfile.is_zipfile(path) else graph)(path, arrays, threads)
    call()
    loading = time.perf_counter() - start
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 20 or (time.perf_counter() - begin < seconds and len(times) < 10_000):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    warm = times[len(times) // 5 :]
    low, median, high = (1e3 * float(np.quantile(warm, q)) for q in (0.25, 0.5, 0.75))
    found = {"latency_ms": median, "quartiles_ms": [low, high], "calls": len(warm), "load_s": loading}
    print(json.dumps({**found, "runtime": runtime}))


def program(path: str, inputs: list[Any], threads: int) -> tuple[Callable[[], list[Any]], str]:
    """Loads a program of StableHLO into JAX."""
    os.environ["NPROC"] = str(threads)  # the number of threads of XLA on a CPU
    import jax
    import jax.numpy as jnp
    from jax import export

    with zipfile.ZipFile(path) as file:
        about = json.loads(file.read("model.json"))
        exported = export.deserialize(bytearray(file.read("evaluation")))
        arrays = [
            jnp.array(np.frombuffer(file.read(f"arrays/{i}"), jnp.dtype(a["dtype"])).reshape(a["shape"]))
            for i, a in enumerate(about["arrays"])
        ]
    compiled = jax.jit(exported.call)
    device = jax.devices()[0]
    where = "" if device.platform == "cpu" else f" on {device.device_kind}"
    return lambda: list(map(np.asarray, compiled(arrays, inputs))), f"JAX {jax.__version__}{where}"


def graph(path: str, inputs: list[Any], threads: int) -> tuple[Callable[[], list[Any]], str]:
    """Loads an ONNX graph into ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {node.name: array for node, array in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: session.run(None, given), f"ONNX Runtime {onnxruntime.__version__}"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
