"""Text to tokens and back, by the package tokenizers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from distill_jax._checks import check_choice, check_count, check_sequence, shown
from distill_jax._model import PyTree

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"


def load_tokenizer(
    path: str | Path,
    *,
    length: int | None = None,
    side: Literal["left", "right"] = "right",
    special: bool = True,
) -> "Tokenizer":
    """Reads a tokenizer that transformers or the package tokenizers saved: ``tokenizer.json``.

    It needs the package tokenizers: ``pip install 'distill_jax[text]'``.

    Args:
      path: a directory that holds ``tokenizer.json``, or such a file.
      length: the number of tokens to which each text is cut or padded, special tokens included. Equal shapes share one
        compiled program. None pads to the longest text of each call, and cuts nothing.
      side: the side on which texts are padded: ``"right"``, or ``"left"`` for :func:`generate`.
      special: whether the tokenizer adds its special tokens, such as BERT's first and last.

    Returns:
      A :class:`Tokenizer`.

    Raises:
      ValueError: if the file is missing or damaged, or an argument is not of that form.
      ModuleNotFoundError: if tokenizers is not installed.
    """
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "text is split by the package tokenizers: pip install 'distill_jax[text]'"
        ) from None
    if length is not None:
        check_count("length", length)
    check_choice("side", side, ("left", "right"))
    check_choice("special", special, (True, False))
    file = Path(path)
    file = file / FILE if file.is_dir() else file
    if not file.is_file():
        raise ValueError(
            f"path: {file} does not exist: expected a {FILE}, as fast tokenizers of transformers save it"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if length is not None:
            tokenizer.enable_truncation(length)
    except Exception as error:  # tokenizers raises no class of its own
        raise ValueError(f"path: {file} cannot be read: {' '.join(str(error).split())}") from None
    _check_room(tokenizer, length, special, pair=False)
    return Tokenizer(tokenizer, length, side, special)


def _check_room(tokenizer: "tokenizers.Tokenizer", length: int | None, special: bool, *, pair: bool) -> None:
    """Raises ``ValueError`` if special tokens alone are longer than a row."""
    least = tokenizer.num_special_tokens_to_add(pair) if special else 0
    if length is not None and length < least:
        raise ValueError(
            f"length must be at least {least}, the number of special tokens of a {'pair' if pair else 'text'}, got "
            f"{length}"
        )


class Tokenizer:
    """Turns texts into the input of a transformer; :func:`load_tokenizer` reads one.

    Attributes:
      tokenizer: the tokenizer of the package tokenizers, for all that is not here:
        ``tokenizer.encode(text, add_special_tokens=False).offsets`` says which part of a text each token is.
    """

    def __init__(self, tokenizer: "tokenizers.Tokenizer", length: int | None, side: str, special: bool):
        self.tokenizer, self.length, self.side, self.special = tokenizer, length, side, special

    @property
    def vocabulary(self) -> int:
        """The number of tokens."""
        return self.tokenizer.get_vocab_size()

    def __call__(self, texts: Sequence[str | tuple[str, str]]) -> dict[str, np.ndarray]:
        """Splits a batch of texts, or of pairs of texts.

        Args:
          texts: strings, or pairs of strings that the tokenizer joins.

        Returns:
          A dict of int32 arrays ``[batch, length]``, an input of a transformer: ``"tokens"``, 0 at padding;
          ``"segments"``, 1 for tokens and 0 for padding; for pairs also ``"types"``, which part a token belongs to.

        Raises:
          ValueError: if ``texts`` is empty or something else.
        """
        check_sequence("texts", texts, "strings")
        for text in texts:
            pair = isinstance(text, tuple) and len(text) == 2
            if not all(isinstance(part, str) for part in (text if pair else (text,))):
                raise ValueError(f"texts must be strings, or pairs of strings, got {shown(text)}")
        if not texts:
            raise ValueError("texts must hold at least one string, got none")
        if any(isinstance(text, tuple) for text in texts):
            _check_room(self.tokenizer, self.length, self.special, pair=True)
        found = self.tokenizer.encode_batch(list(texts), add_special_tokens=self.special)
        length = self.length or max(1, *(len(encoding.ids) for encoding in found))
        names = ["tokens", "segments"] + ["types"] * any(isinstance(text, tuple) for text in texts)
        arrays = {name: np.zeros((len(found), length), np.int32) for name in names}
        for i, encoding in enumerate(found):
            count = len(encoding.ids)
            place = slice(length - count, length) if self.side == "left" else slice(count)
            arrays["tokens"][i, place] = encoding.ids
            arrays["segments"][i, place] = 1
            if "types" in arrays:
                arrays["types"][i, place] = encoding.type_ids
        return arrays

    def decode(self, x: PyTree) -> list[str]:
        """Joins tokens to texts, without special tokens.

        Args:
          x: tokens ``[batch, length]``, or a dict with ``"tokens"`` and ``"segments"``, such as :func:`generate`
            returns, whose padding is left out.

        Returns:
          One string per row.
        """
        entries = x if isinstance(x, Mapping) else {"tokens": x}
        tokens = np.asarray(entries["tokens"])
        kept = np.asarray(entries.get("segments", np.ones(tokens.shape))) != 0
        rows = [row[keep].tolist() for row, keep in zip(tokens, kept, strict=True)]
        return self.tokenizer.decode_batch(rows, skip_special_tokens=True)
