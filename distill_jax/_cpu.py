"""How programs are compiled for a CPU, and where their memory comes from."""

import ctypes
import functools
import os
import sys

import jax

_FUSIONS = "xla_cpu_experimental_ynn_fusion_type"
# glibc's numbers of these options, from malloc.h, and Linux's of this advice
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX, _HUGE_PAGES = -1, -4, -8, 14


@functools.cache
def compiler_options() -> dict[str, str] | None:
    """Gives the compiler options with which networks train fastest on a CPU, for ``jax.jit``.

    XLA hands convolutions on a CPU to the library YNNPACK by default. Its own convolutions take a third to all of
    that time, above all for the gradient with respect to the kernel. These options keep YNNPACK for matrix
    products and sums alone. :func:`fit`, :func:`make_epoch`, :func:`make_measure` and
    :func:`distill_jax.models.predict` use them by themselves. Results differ from those without the options in their
    last digits.

    JAX accepts compiler options for the outermost ``jit`` only.

    Returns:
      The options; None on other platforms, where this version of JAX does not know them, or where the environment
      variable ``XLA_FLAGS`` sets the same option.

    >>> step = jax.jit(lambda x: x + 1, compiler_options=compiler_options())
    """
    if jax.default_backend() != "cpu" or _FUSIONS in os.environ.get("XLA_FLAGS", ""):
        return None
    options = {_FUSIONS: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"}
    try:
        jax.jit(lambda: 0.0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options


def keep_memory() -> bool:
    """Keeps the memory that the process frees, in huge pages, so that training steps on a CPU find it again.

    XLA asks the C library for the buffers of a program at each call. For large buffers the C library asks the
    system, which has to clear each page anew: this can be a quarter of the time of a step. After this call, freed
    memory stays with the process until it ends. Call it before the first computation. It changes the whole process,
    so the library never calls it by itself; the experiments do. It works on Linux with the GNU C library.

    Returns:
      Whether the C library took the settings.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # another C library
        return False
    settings = (_TRIM_THRESHOLD, -1), (_MMAP_MAX, 0), (_ARENA_MAX, 1)
    taken = [libc.mallopt(option, value) for option, value in settings]
    # Huge pages must be asked for by address, so the heap is made as large as it may become. That takes
    # addresses only: memory is used when it is written to
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    start = libc.malloc(size)
    if start:
        huge = 2**21
        first = -(-start // huge) * huge
        libc.madvise(first, (start + size - first) // huge * huge, _HUGE_PAGES)
        libc.free(start)
    return all(taken)
