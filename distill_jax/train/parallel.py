"""Data parallelism under ``jit``: the batch laid over devices, everything else on each of them."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def use_cpu_devices(count: int) -> None:
    """Splits the CPU into ``count`` devices; only before anything else has used JAX.

    One device a core is the fastest way to train convolutions on a CPU.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if jax.device_count() < count:
            raise ValueError(
                f"{count} CPU devices were asked for, but JAX is already running with "
                f"{jax.device_count()}; ask before any other JAX call"
            ) from error


def data_mesh(devices: int | None = None) -> Mesh:
    """Makes a mesh with one axis, ``"batch"``, over the first ``devices`` devices (None: all).

    Raises:
      ValueError: if there are not that many.
    """
    available = jax.devices()
    count = len(available) if devices is None else devices
    if not 1 <= count <= len(available):
        raise ValueError(f"devices must be 1 to {len(available)} here, got {devices}")
    return jax.make_mesh((count,), ("batch",), axis_types=(AxisType.Auto,), devices=available[:count])


def sharded(mesh: Mesh) -> NamedSharding:
    """Lays an array's first axis over the mesh."""
    return NamedSharding(mesh, PartitionSpec("batch"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Puts the whole array on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())
