"""Encodes the examples of a training run, each question and each image once instead of once per epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_unlearn.data.encoding import Batch, Turn, encode, encode_with_labels
from vlm_unlearn.data.images import ImageSource, open_image
from vlm_unlearn.data.processor_call import Processor, requires_image
from vlm_unlearn.losses import IGNORED

if TYPE_CHECKING:
    from PIL import Image

CACHE_BYTES = 128 << 20  # of a run, for its encoded questions and its images together
# The tensors [1, S] of a question whose padding is known. The padding of `input_ids` is the tokenizer's.
TOKEN_PADDING = {"attention_mask": 0, "mm_token_type_ids": 0, "labels": IGNORED}
IMAGE_KEYS = ("pixel_values", "image_")  # the names of tensors about images begin with one of these


class TurnEncoder:
    """Encodes batches of turns, with the results of `encode` and `encode_with_labels`, padded on the right.

    A question is encoded once, alone, and a batch is put together from its questions. If the batch of a family has
    another form than that, such as padded images, the batch is encoded as a whole. The cache stops growing at its
    limit, and never evicts: each epoch uses all examples in turn, so that eviction would remove each of them shortly
    before its next use.

    Args:
        processor: The processor of the model. It must not change while the encoder is used.
        max_length: The maximum number of tokens of a question with its answers.
        limit: The maximum number of bytes of the cache.
    """

    def __init__(self, processor: Processor, max_length: int, limit: int = CACHE_BYTES) -> None:
        self._processor = processor
        self._max_length = max_length
        self._room = limit
        self._rows: dict[tuple[Turn, bool], Batch] = {}
        self._images = _ImageCache(getattr(processor, "image_processor", None), self._reserve)
        self._row_processor = copy.copy(processor)  # the tokenizer is shared
        self._row_processor.image_processor = self._images

    def __getstate__(self) -> dict[str, Any]:
        # A data worker that is started anew fills a cache of its own.
        return {"processor": self._processor, "max_length": self._max_length, "limit": self._room}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def encode(self, turns: Sequence[Turn]) -> Batch:
        """Returns the batch of `encode`.

        Raises:
            UserError: An error of `encode`.
        """
        return self._encode(turns, with_labels=False)

    def encode_with_labels(self, turns: Sequence[Turn]) -> Batch:
        """Returns the batch of `encode_with_labels`.

        Raises:
            UserError: An error of `encode_with_labels`.
        """
        return self._encode(turns, with_labels=True)

    def _encode(self, turns: Sequence[Turn], with_labels: bool) -> Batch:
        if not requires_image(self._processor):
            batch = self._joined([self._row(turn, with_labels) for turn in turns])
            if batch is not None:
                return batch
        return self._call(self._processor, turns, with_labels, open_image)

    def _row(self, turn: Turn, with_labels: bool) -> Batch:
        row = self._rows.get((turn, with_labels))
        if row is None:
            self._images.source = turn.image
            try:
                row = self._call(self._row_processor, [turn], with_labels, self._images.open)
            except _OtherArgumentsError:
                return self._call(self._processor, [turn], with_labels, open_image)
            if self._images.is_stored(turn.image) and self._reserve(self._images.additional_bytes(row)):
                self._rows[turn, with_labels] = row
        return row

    def _call(
        self,
        processor: Processor,
        turns: Sequence[Turn],
        with_labels: bool,
        opener: Callable[[ImageSource], Image.Image],
    ) -> Batch:
        if with_labels:
            return encode_with_labels(processor, turns, self._max_length, opener)
        return encode(processor, turns, "right", opener)

    def _joined(self, rows: Sequence[Batch]) -> Batch | None:
        """Returns the batch of rows, or None if the processor may put their batch together in another way."""
        if len(rows) == 1:
            # A data worker moves the tensors that it returns to shared memory.
            return {key: value.clone() for key, value in rows[0].items()}
        first = rows[0]
        if any(row.keys() != first.keys() for row in rows[1:]):
            return None
        width = max(row["input_ids"].shape[1] for row in rows)
        padding = {**TOKEN_PADDING, "input_ids": self._processor.tokenizer.pad_token_id}
        batch: Batch = {}
        for key, value in first.items():
            values = [row[key] for row in rows]
            if key in padding:
                if padding[key] is None:
                    return None
                values = [F.pad(item, (0, width - item.shape[1]), value=padding[key]) for item in values]
            elif not key.startswith(IMAGE_KEYS) or any(item.shape[1:] != value.shape[1:] for item in values):
                return None
            batch[key] = torch.cat(values)
        return batch

    def _reserve(self, size: int) -> bool:
        """Returns whether the cache has room for `size` more bytes, and takes them from it."""
        if size > self._room:
            return False
        self._room -= size
        return True


class _OtherArgumentsError(Exception):
    """The image processor is called with other arguments than for the stored result."""


class _ImageCache:
    """Stands for an image processor, and returns the stored result for an image that was processed before.

    Attributes:
        source: The image of the next call. None for no image.
    """

    def __init__(self, image_processor: Any, reserve: Callable[[int], bool]) -> None:
        self._image_processor = image_processor
        self._reserve = reserve
        self._results: dict[ImageSource, _Processed] = {}
        self._latest: tuple[ImageSource, _Processed] | None = None  # also of an image for which there is no room
        self._size = (0, 0)
        self.source: ImageSource | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)

    def open(self, source: ImageSource) -> Image.Image:
        """Returns an image. One whose result is stored has the same size and no content, since only that is needed."""
        from PIL import Image

        processed = self._stored(source)
        if processed is not None:
            return Image.new("RGB", processed.size)
        image = open_image(source)
        self._size = image.size
        return image

    def is_stored(self, source: ImageSource | None) -> bool:
        """Returns whether the result of an image is stored. Without an image there is nothing to store."""
        return source is None or source in self._results

    def additional_bytes(self, row: Batch) -> int:
        """Returns the size of the tensors of a row that are not those of the stored result of its image."""
        processed = self._stored(self.source)
        values = [] if processed is None else processed.result.values()
        shared = {value.data_ptr() for value in values if isinstance(value, Tensor)}
        return sum(_num_bytes(value) for value in row.values() if value.data_ptr() not in shared)

    def _stored(self, source: ImageSource | None) -> _Processed | None:
        if source is None:
            return None
        if self._latest is not None and self._latest[0] == source:
            return self._latest[1]
        return self._results.get(source)

    def __call__(self, images: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Returns the result of the image processor for the image `source`.

        Raises:
            _OtherArgumentsError: The stored result is that of a call with other arguments.
        """
        processed = self._stored(self.source)
        arguments = repr((args, sorted(kwargs.items())))
        if processed is not None:
            if processed.arguments != arguments:  # `images` has no content
                raise _OtherArgumentsError
            return copy.copy(processed.result)  # a processor may remove some of its values
        result = self._image_processor(images, *args, **kwargs)
        if self.source is not None:
            processed = _Processed(copy.copy(result), self._size, arguments)
            self._latest = self.source, processed
            if self.source not in self._results and self._reserve(sum(map(_num_bytes, result.values()))):
                self._results[self.source] = processed
        return result


class _Processed:
    """The result of an image processor for one image.

    Args:
        result: The result.
        size: The width and the height of the image.
        arguments: The other arguments of the call, as text.
    """

    def __init__(self, result: Any, size: tuple[int, int], arguments: str) -> None:
        self.result = result
        self.size = size
        self.arguments = arguments


def _num_bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
