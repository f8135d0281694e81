"""Several devices under ``jit``: each holds a part of the batch and a copy of everything else."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distill_jax._checks import check_count, is_integer


def use_cpu_devices(count: int) -> None:
    """Splits the CPU into several devices. It must be called before anything else uses JAX.

    One device per core rarely trains faster than one device, which uses all cores too: measure it for your network.

    Args:
      count: the number of devices.

    Raises:
      ValueError: if JAX is already running with fewer devices.
    """
    check_count("count", count)
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if jax.device_count() < count:
            raise ValueError(
                f"{count} CPU devices were asked for, but JAX is already running with "
                f"{jax.device_count()}; ask before any other JAX call"
            ) from error


def data_mesh(devices: int | None = None) -> Mesh:
    """Makes a mesh of devices with one axis, named ``"batch"``.

    Args:
      devices: the number of devices, of which the first are taken; None takes all.

    Returns:
      The mesh.

    Raises:
      ValueError: if there are not that many.
    """
    available = jax.devices()
    count = len(available) if devices is None else devices
    if not is_integer(count) or not 1 <= count <= len(available):
        raise ValueError(f"devices must be 1 to {len(available)} here, got {devices}")
    return jax.make_mesh((count,), ("batch",), axis_types=(AxisType.Auto,), devices=available[:count])


def _check(mesh: Mesh) -> None:
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, such as data_mesh(), got {type(mesh).__name__}")


def sharded(mesh: Mesh) -> NamedSharding:
    """Makes the sharding that splits the first axis of an array over the devices of a mesh.

    Args:
      mesh: a mesh from :func:`data_mesh`.

    Returns:
      The sharding, for ``jax.device_put`` or :func:`distill_jax.train.make_epoch`.
    """
    _check(mesh)
    return NamedSharding(mesh, PartitionSpec("batch"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Makes the sharding that puts a copy of the whole array on each device of a mesh.

    Args:
      mesh: a mesh from :func:`data_mesh`.

    Returns:
      The sharding, for ``jax.device_put``.
    """
    _check(mesh)
    return NamedSharding(mesh, PartitionSpec())
