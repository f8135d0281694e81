"""Views: augmented versions of the examples, each of which can be made again from its key."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distill_jax._checks import check_count, check_function, is_key, need
from distill_jax._model import Model, PyTree, example_count
from distill_jax.teachers._fingerprint import fingerprint
from distill_jax.teachers._ids import IMPL, VIEWS, as_ids, check_seed, fold_view, keys_of
from distill_jax.teachers.labelling import label


@dataclasses.dataclass(frozen=True)
class Views:
    """Augmented versions of each example, its *views*, with which stored labels fit augmented images.

    The key of view v of an example is a function of ``seed``, the example's id and v. So a teacher can label all
    views once (``write_labels(..., views=views)``), and a training step can make the same views again: it costs what
    stored labels cost, and the student sees what it would see with the teacher online.

    Attributes:
      augment: ``(key, image) -> image``, for *one* example: a pure function that ends with the model's input.
      count: the number of views per example.
      seed: the seed of the keys, from 0 to 2³² − 1.

    References:
      Beyer et al., `Knowledge distillation: A good teacher is patient and consistent`, 2022 (arXiv 2106.05237), §3
      (teacher and student see the same views).

    >>> import jax.numpy as jnp
    >>> views = Views(lambda key, image: image + jax.random.normal(key), count=2)
    >>> images, ids = jnp.zeros((3, 4)), np.array([7, 8, 9])
    >>> views.apply(views.keys(ids, 1), images).shape
    (3, 4)
    """

    augment: Callable[[jax.Array, PyTree], PyTree]
    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_function("augment", self.augment, "key, image")
        check_count("count", self.count)
        check_seed(self.seed)

    def keys(self, ids: ArrayLike, view: int) -> jax.Array:
        """Computes the keys of one view of some examples.

        Args:
          ids: the ids of the examples, integers ``[n]``.
          view: the number of the view, from 0 to ``count`` − 1.

        Returns:
          Random keys ``[n]``.

        Raises:
          ValueError: if the ids are no integers, or there is no such view.
        """
        check_count("view", view, least=0)
        if view >= self.count:
            raise ValueError(f"view must be below {self.count}, the number of views, got {view}")
        return fold_view(keys_of(self.seed, VIEWS, as_ids(ids)), np.uint32(view))

    def apply(self, keys: jax.Array, images: PyTree) -> PyTree:
        """Augments examples, each with its own key.

        Args:
          keys: random keys ``[n]``, from :meth:`keys`.
          images: an array, or a pytree of arrays, ``[n, ...]``.

        Returns:
          The augmented examples, ``[n, ...]``.

        Raises:
          ValueError: if there is not one key per example.
        """
        if not is_key(keys) or np.shape(keys) != (example_count("images", images),):
            got = np.shape(keys) if is_key(keys) else type(keys).__name__
            raise ValueError(f"keys must be random keys [n], one per image, got {got}")
        return _augmented(self.augment, keys, images)

    def fields(self, ids: ArrayLike) -> dict[str, np.ndarray]:
        """Makes what :meth:`transform` needs of each example, to be added to the training arrays.

        Args:
          ids: the ids of the examples, integers ``[n]``, in the order of the labels.

        Returns:
          ``"row"``, int32 ``[n]``, and ``"key"``, uint32 ``[n, 2]``.
        """
        keys = keys_of(self.seed, VIEWS, as_ids(ids))
        return {"row": np.arange(len(keys), dtype=np.int32), "key": np.asarray(jax.random.key_data(keys))}

    def fingerprint(self, ids: ArrayLike, images: PyTree) -> str:
        """Computes a checksum of some views: as a rule it differs for another augmentation.

        So it does for other settings and another seed. A change that shows only in views or examples that are not taken
        is not seen. It is meant as the entry ``"augmentation"`` of a store's fingerprint. It is a checksum of rounded
        numbers: for a store that several kinds of machines read, describe the augmentation in words.

        Args:
          ids: the ids of the examples, integers ``[n]``; the first view of the 16 smallest is taken.
          images: an array, or a pytree of arrays, ``[n, ...]``.

        Returns:
          64 hexadecimal digits.

        Raises:
          ValueError: if the ids are no integers, or there is not one per image.
        """
        ids, count = as_ids(ids), example_count("images", images)
        if ids.shape != (count,):
            raise ValueError(f"ids must be [{count}], one per image, got shape {ids.shape}")
        first = np.argsort(ids)[:16]
        some = jax.tree.map(lambda x: x[first], images)
        return fingerprint(self.apply(self.keys(ids[first], 0), some))

    def transform(self, context: PyTree, batch: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
        """Draws a view of each example and makes it: the ``transform`` of :func:`distill_jax.train.make_epoch`.

        Args:
          context: the labels of all views, arrays ``[examples, count, ...]``, as a store gives them for ``fields``'
            ids; or a teacher, a :class:`distill_jax.models.Model`, which labels the views online.
          batch: a dict with ``"image"`` and the fields of :meth:`fields`.
          key: draws the views.

        Returns:
          The batch with augmented ``"image"`` and with ``"teacher"``, as :func:`label` makes it.

        Raises:
          ValueError: if the batch lacks a field, or the labels have another number of views.
        """
        need(batch, "image", "row", "key")
        row, keys = batch["row"], jax.random.wrap_key_data(batch["key"], impl=IMPL)
        view = jax.random.randint(key, row.shape, 0, self.count)
        image = jax.vmap(self.augment)(fold_view(keys, view), batch["image"])
        made = {name: x for name, x in batch.items() if name not in ("row", "key")} | {"image": image}
        if isinstance(context, Model):
            return label(context, made)
        for leaf in jax.tree.leaves(context):
            if np.ndim(leaf) < 2 or leaf.shape[1] != self.count:
                raise ValueError(
                    f"the labels must have shape [examples, {self.count}, ...], one entry per view, got "
                    f"{np.shape(leaf)}"
                )

        def chosen(labels):
            return jnp.asarray(labels).at[row, view].get(mode="fill")  # NaN for a row that is not there

        return {**made, "teacher": jax.tree.map(chosen, context)}


@functools.partial(jax.jit, static_argnums=0)
def _augmented(augment: Callable[..., PyTree], keys: jax.Array, images: PyTree) -> PyTree:
    return jax.vmap(augment)(keys, images)
