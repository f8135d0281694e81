"""Teachers: functions that add soft labels to a batch, and the store that keeps these labels on disk."""

from distill_jax.teachers import kinds
from distill_jax.teachers.labelling import ensemble, label, label_each
from distill_jax.teachers.store import LabelStore, fingerprint, import_labels, open_labels, write_labels
from distill_jax.teachers.texts import token_ids, write_samples, write_token_labels
from distill_jax.teachers.views import Views

__all__ = [
    "LabelStore", "Views", "ensemble", "fingerprint", "import_labels", "kinds", "label", "label_each", "open_labels",
    "token_ids", "write_labels", "write_samples", "write_token_labels",
]  # fmt: skip
