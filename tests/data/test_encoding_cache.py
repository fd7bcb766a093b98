"""Encoding with a cache gives the batches of encoding without it, in every family."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from families import FAMILIES, shared_folder
from vlm_unlearn.data import encoding_cache
from vlm_unlearn.data.encoding import Batch, Turn, encode, encode_with_labels
from vlm_unlearn.data.encoding_cache import TurnEncoder
from vlm_unlearn.data.images import image_reference
from vlm_unlearn.errors import UserError
from vlm_unlearn.modeling.loader import load_processor


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three images, two of them of the same size."""
    folder = tmp_path_factory.mktemp("images")
    files = []
    for number, size in enumerate([(40, 30), (40, 30), (64, 90)]):
        files.append(folder / f"{number}.png")
        noise = torch.randint(0, 255, (size[1], size[0], 3), generator=torch.manual_seed(number), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(files[-1])
    return files


@pytest.fixture
def llava(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The processor of a LLaVA."""
    return load_processor(shared_folder("llava", tmp_path_factory))


def turns(images: list[Path]) -> list[Turn]:
    """Questions of different length, two of them on one image."""
    return [
        Turn("a", images[0], "what is it?", "a cat."),
        Turn("b", images[1], "what is the color of the thing in the picture?", "it is red and green."),
        Turn("c", images[0], "name it.", "a small dog on a mat."),
        Turn("d", images[2], "tell me more.", "no."),
    ]


def assert_equal(batch: Batch, expected: Batch) -> None:
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        assert batch[key].dtype == value.dtype
        assert torch.equal(batch[key], value), key


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_are_those_without_a_cache(
    family: str, images: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    processor = load_processor(shared_folder(family, tmp_path_factory))
    encoder = TurnEncoder(processor, 4096)
    samples = turns(images)
    for batch in (samples[:2], samples[:3], samples, samples[3:], samples[1:3], samples[:1], samples):
        assert_equal(encoder.encode_with_labels(batch), encode_with_labels(processor, batch, 4096))
        assert_equal(encoder.encode(batch), encode(processor, batch, "right"))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3", "gemma3"])
def test_batches_with_and_without_images(
    family: str, images: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    processor = load_processor(shared_folder(family, tmp_path_factory))
    encoder = TurnEncoder(processor, 4096)
    text_only = Turn("text", None, "what is green?", "grass.")
    for batch in ([turns(images)[0], text_only], [text_only, text_only], [text_only], [text_only, *turns(images)]):
        assert_equal(encoder.encode_with_labels(batch), encode_with_labels(processor, batch, 4096))


def test_long_answers_are_truncated_alike(llava: Any, images: list[Path]) -> None:
    samples = turns(images)
    widths = [encode_with_labels(llava, [turn], 4096)["input_ids"].shape[1] for turn in samples]
    encoder = TurnEncoder(llava, max(widths) - 2)
    assert_equal(encoder.encode_with_labels(samples), encode_with_labels(llava, samples, max(widths) - 2))
    with pytest.raises(UserError) as failure:
        TurnEncoder(llava, 2).encode_with_labels(samples)
    assert failure.value.code == "question-too-long"


def test_each_image_is_opened_and_processed_once(
    llava: Any, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    open_image = encoding_cache.open_image
    monkeypatch.setattr(encoding_cache, "open_image", lambda source: opened.append(source) or open_image(source))
    processed: list[int] = []
    kind = type(llava.image_processor)
    original = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda *args, **kwargs: processed.append(1) or original(*args, **kwargs))
    encoder = TurnEncoder(llava, 4096)
    for _ in range(3):
        encoder.encode_with_labels(turns(images))
        encoder.encode(turns(images))
    assert opened == images
    assert len(processed) == len(images)


def test_a_full_cache_keeps_what_it_has(llava: Any, images: list[Path]) -> None:
    samples = turns(images)
    image_bytes = encode(llava, samples[:1], "right")["pixel_values"].nbytes
    for limit in (0, image_bytes // 2, image_bytes + 2000):
        encoder = TurnEncoder(llava, 4096, limit)
        for batch in (samples, samples[::-1], samples):
            assert_equal(encoder.encode_with_labels(batch), encode_with_labels(llava, batch, 4096))


def test_images_of_one_size_in_memory_are_told_apart(llava: Any, images: list[Path]) -> None:
    references = [image_reference(Image.open(file)) for file in images]
    samples = [Turn("x", reference, "what is it?", "a cat.") for reference in references]
    encoder = TurnEncoder(llava, 4096)
    for _ in range(2):
        assert_equal(encoder.encode_with_labels(samples), encode_with_labels(llava, samples, 4096))


def test_a_changed_batch_does_not_change_the_cache(llava: Any, images: list[Path]) -> None:
    encoder = TurnEncoder(llava, 4096)
    for batch in (turns(images)[:1], turns(images)):
        changed = encoder.encode_with_labels(batch)
        for value in changed.values():
            value.zero_()
        assert_equal(encoder.encode_with_labels(batch), encode_with_labels(llava, batch, 4096))


def test_a_data_worker_gets_an_empty_cache(llava: Any, images: list[Path]) -> None:
    encoder = TurnEncoder(llava, 4096)
    size = len(pickle.dumps(encoder))
    expected = encoder.encode_with_labels(turns(images))
    copied = pickle.dumps(encoder)
    assert abs(len(copied) - size) < 1000
    assert_equal(pickle.loads(copied).encode_with_labels(turns(images)), expected)


def test_a_broken_image_is_an_error_each_time(llava: Any, images: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:100])
    encoder = TurnEncoder(llava, 4096)
    for _ in range(2):
        with pytest.raises(UserError) as failure:
            encoder.encode_with_labels([turns(images)[0], Turn("bad", broken, "what is it?", "a cat.")])
        assert (failure.value.code, failure.value.record) == ("invalid-image", '"bad"')
    assert_equal(encoder.encode_with_labels(turns(images)), encode_with_labels(llava, turns(images), 4096))
