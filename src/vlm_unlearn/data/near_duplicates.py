"""Near-duplicates across sets: questions by MinHash (datasketch), images by difference hash."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIMILAR = 0.8  # Jaccard similarity of the word sets of two questions
PERMUTATIONS = 64
NEAR_BITS = 3  # of the 64 bits of two images' hashes that may differ
_PUNCTUATION = str.maketrans(dict.fromkeys(".,?!:;\"'…¿¡。、，．？！：；“”‘’„«»()[]", " "))


def normalize_question(question: str) -> str:
    """The question without case, spacing and the punctuation of sentences: what two questions share that are the same.

    Signs that carry meaning stay: ``2+2``, ``C++``, vowel signs, symbols.
    """
    return " ".join(unicodedata.normalize("NFKC", question).casefold().translate(_PUNCTUATION).split())


class NearQuestions:
    """Finds, for a question, one that was added before and shares at least `SIMILAR` of their words."""

    def __init__(self) -> None:
        from datasketch import MinHashLSH

        # 16 bands of 4: of the pairs at the threshold 2 in 10,000 are missed; what it finds too much is compared below.
        self._index = MinHashLSH(params=(16, 4), num_perm=PERMUTATIONS)
        self._words: list[frozenset[bytes]] = []
        self._names: list[int] = []

    def add(self, questions: Iterable[tuple[int, str]]) -> None:
        """Adds named questions, as `normalised` gives them."""
        for name, words, sketch in _sketches(questions):
            self._index.insert(len(self._words), sketch)
            self._words.append(words)
            self._names.append(name)

    def matches(self, questions: Iterable[tuple[int, str]]) -> Iterator[tuple[int, int]]:
        """``(name, name of one that was added)`` for each question that has a near one."""
        for name, words, sketch in _sketches(questions):
            for candidate in self._index.query(sketch):
                if _jaccard(words, self._words[candidate]) >= SIMILAR:
                    yield name, self._names[candidate]
                    break


def _sketches(questions: Iterable[tuple[int, str]]) -> Iterator[tuple[int, frozenset[bytes], object]]:
    from datasketch import MinHash

    for name, text in questions:
        words = frozenset(word.encode("utf-8", "replace") for word in text.split())
        if len(words) >= 3:  # of shorter ones nearly all are near each other
            sketch = MinHash(num_perm=PERMUTATIONS)
            sketch.update_batch(list(words))
            yield name, words, sketch


def _jaccard(one: frozenset[bytes], other: frozenset[bytes]) -> float:
    return len(one & other) / len(one | other)


def difference_hash(image: Image.Image) -> int:
    """64 bits that a resized, recompressed or slightly brightened copy keeps: which of two neighbouring cells is brighter.

    An image without any structure hashes to 0 and is near nothing.
    """
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")


def near_images(
    hashes: NDArray[np.uint64], members: Mapping[str, Sequence[int]], one: str, other: str
) -> Iterator[tuple[int, int]]:
    """For each image of the larger set one of the smaller whose hash differs in at most `NEAR_BITS` bits, where there is one.

    Exact: with 3 bits changed, one of 4 bands of 16 bits is unchanged, so that only images that share a band are compared.

    Args:
        hashes: by image index.
        members: the images of each set.
    """
    small, large = sorted((one, other), key=lambda name: len(members[name]))
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
                if candidate != index and (value ^ int(hashes[candidate])).bit_count() <= NEAR_BITS
            )
            found = next(near, None)
            if found is not None:
                yield (found, index) if small == one else (index, found)
                break
