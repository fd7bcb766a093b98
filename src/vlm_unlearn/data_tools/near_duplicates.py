"""Finds near-duplicates across sets: questions by MinHash (datasketch), images by difference hash."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MIN_SIMILARITY = 0.8  # Jaccard similarity of the word sets of two questions
NUM_PERMUTATIONS = 64
MAX_BIT_DIFFERENCE = 3  # of the 64 bits of two image hashes
_PUNCTUATION = str.maketrans(dict.fromkeys(".,?!:;\"'…¿¡。、，．？！：；“”‘’„«»()[]", " "))


def normalize_question(question: str) -> str:
    """Returns the question without case, extra spaces and sentence punctuation, so that equal questions compare equal.

    Signs that carry meaning stay, as in ``2+2`` and ``C++``, and so do vowel signs and symbols.
    """
    return " ".join(unicodedata.normalize("NFKC", question).casefold().translate(_PUNCTUATION).split())


class NearQuestions:
    """An index of questions. Finds an indexed question with a Jaccard similarity of at least `MIN_SIMILARITY`."""

    def __init__(self) -> None:
        from datasketch import MinHashLSH

        # 16 bands of 4 rows miss 2 in 10,000 pairs at the threshold. `matches` removes the false candidates.
        self._index = MinHashLSH(params=(16, 4), num_perm=NUM_PERMUTATIONS)
        self._words: list[frozenset[bytes]] = []
        self._names: list[int] = []

    def add(self, questions: Iterable[tuple[int, str]]) -> None:
        """Adds ``(name, question)`` pairs. The questions come from `normalize_question`."""
        for name, words, sketch in _sketches(questions):
            self._index.insert(len(self._words), sketch)
            self._words.append(words)
            self._names.append(name)

    def matches(self, questions: Iterable[tuple[int, str]]) -> Iterator[tuple[int, int]]:
        """Yields ``(name, name of an indexed question)`` for each question with a near-duplicate in the index."""
        for name, words, sketch in _sketches(questions):
            for candidate in self._index.query(sketch):
                candidate_words = self._words[candidate]
                if len(words & candidate_words) / len(words | candidate_words) >= MIN_SIMILARITY:
                    yield name, self._names[candidate]
                    break


def _sketches(questions: Iterable[tuple[int, str]]) -> Iterator[tuple[int, frozenset[bytes], object]]:
    from datasketch import MinHash

    for name, text in questions:
        words = frozenset(word.encode("utf-8", "replace") for word in text.split())
        if len(words) >= 3:  # nearly all shorter questions are similar to each other
            sketch = MinHash(num_perm=NUM_PERMUTATIONS)
            sketch.update_batch(list(words))
            yield name, words, sketch


def difference_hash(image: Image.Image) -> int:
    """Returns a 64-bit hash that survives resizing, recompression and slight brightening.

    Each bit compares the brightness of two neighboring cells. An image without any structure hashes to 0, which
    `near_images` ignores.
    """
    cells = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")


def near_images(
    hashes: NDArray[np.uint64], members: Mapping[str, Sequence[int]], left_set: str, right_set: str
) -> Iterator[tuple[int, int]]:
    """Yields at most one near-duplicate from the smaller set for each image of the larger set.

    Two images are near-duplicates if their hashes differ in at most `MAX_BIT_DIFFERENCE` bits. The search is exact: if
    3 bits differ, at least one of the 4 bands of 16 bits is equal, so only images that share a band are compared.

    Args:
        hashes: The hash of each image, by image index.
        members: The image indices of each set.

    Yields:
        ``(index in left_set, index in right_set)``.
    """
    small, large = sorted((left_set, right_set), key=lambda name: len(members[name]))
    bands: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index in members[small]:
        value = int(hashes[index])
        for band in range(4) if value else ():
            bands[band, value >> (16 * band) & 0xFFFF].append(index)
    for index in members[large]:
        value = int(hashes[index])
        if value == 0:
            continue
        for band in range(4):
            near = (
                candidate
                for candidate in bands.get((band, value >> (16 * band) & 0xFFFF), ())
                if candidate != index and (value ^ int(hashes[candidate])).bit_count() <= MAX_BIT_DIFFERENCE
            )
            match = next(near, None)
            if match is not None:
                yield (match, index) if small == left_set else (index, match)
                break
