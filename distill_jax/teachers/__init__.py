"""Teachers: functions that add soft labels to a batch, and the store that keeps these labels on disk."""

from distill_jax.teachers.labelling import ensemble, label_each, make_label, predict
from distill_jax.teachers.store import LabelStore, fingerprint, import_labels, open_labels, write_labels

__all__ = [
    "LabelStore", "ensemble", "fingerprint", "import_labels", "label_each", "make_label",
    "open_labels", "predict", "write_labels",
]  # fmt: skip
