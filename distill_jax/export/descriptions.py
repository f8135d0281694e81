"""What an exported file says of itself."""

from pathlib import Path
from typing import Any

from distill_jax.models import files


def describe(path: str | Path) -> dict[str, Any]:
    """Reads what an exported file says of itself, and checks that it is whole.

    Args:
      path: a file of :func:`distill_jax.export.stablehlo` or :func:`distill_jax.models.save`.

    Returns:
      ``format``; ``bytes``, the size of the file; ``platforms``; ``inputs`` and ``outputs``, each a list of
      name, shape and dtype, where ``"batch"`` in a shape stands for any size; ``labels``, ``preprocessing`` and
      ``provenance`` as they were given, or None; ``digest``, the SHA-256 of parameters and state; ``made by``, the
      versions of the libraries that wrote it.

    Raises:
      ValueError: if the file is none of these, of another version of the format, or damaged.
    """
    description, _ = files.read(path)
    program = description["programs"]["evaluation"]
    inputs = description["x arrays"]
    if program["any batch size"]:
        inputs = [{**each, "shape": ["batch", *each["shape"][1:]]} for each in inputs]
    return {
        "format": description["format"],
        "bytes": Path(path).stat().st_size,
        "platforms": program["platforms"],
        "inputs": inputs,
        "outputs": program["output arrays"],
        **{name: description.get(name) for name in ("labels", "preprocessing", "provenance", "digest")},
        "made by": {name: description[name] for name in ("distill_jax", "jax") if name in description},
    }
