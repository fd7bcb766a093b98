"""`image_aspect_ratio: pad` pads images to squares as LLaVA's own code does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import families
from helpers import raises_code
from vlm_unlearn.data.processor_call import Processor
from vlm_unlearn.modeling.loader import load_processor

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.shared_folder("llava", tmp_path_factory)


def noise(width: int, height: int) -> tuple[Image.Image, np.ndarray]:
    pixels = np.random.default_rng(1).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels), pixels


def process(processor: Processor, image: Image.Image) -> np.ndarray:
    """Returns the pixels of the processed image, [height, width, 3]."""
    return processor.image_processor([image], return_tensors="pt")["pixel_values"][0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("width", "height"), [(32, 20), (15, 32), (32, 32)])
def test_pad_centers_image_on_mean_color_as_llava(width: int, height: int, folder: Path, tmp_path: Path) -> None:
    """LLaVA pads to a square of the longer side in the mean color. An odd pixel goes to the right or bottom.

    The longer side has the model's image size. Nothing is resized, so that every pixel can be compared.
    """
    image, pixels = noise(width, height)
    processor = load_processor(folder, image_aspect_ratio="pad")
    processor.save_pretrained(tmp_path / "saved")
    expected = np.empty((32, 32, 3))
    expected[:] = [122, 116, 104]  # the mean times 255, rounded down
    top, left = (32 - height) // 2, (32 - width) // 2
    expected[top : top + height, left : left + width] = pixels
    expected = (expected / 255 - CLIP_MEAN) / CLIP_STD
    for padding_processor in (processor, load_processor(tmp_path / "saved")):
        assert padding_processor.image_processor.do_pad
        np.testing.assert_allclose(process(padding_processor, image), expected, atol=1e-5)
    unpadded = process(load_processor(folder), image)
    assert np.allclose(unpadded, expected, atol=1e-5) == (width == height)


def test_pad_keeps_settings_of_siglip(folder: Path, tmp_path: Path) -> None:
    from transformers import SiglipImageProcessorPil

    processor = load_processor(folder)
    processor.image_processor = SiglipImageProcessorPil(
        size={"height": 48, "width": 48}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    processor.save_pretrained(tmp_path / "siglip")
    image, _ = noise(48, 10)
    pixels = process(load_processor(tmp_path / "siglip", image_aspect_ratio="pad"), image)
    assert pixels.shape == (48, 48, 3)
    np.testing.assert_allclose(pixels[:19], (127 / 255 - 0.5) / 0.25, atol=1e-5)


@pytest.mark.parametrize("family", [family for family in families.FAMILIES if family != "llava"])
def test_pad_with_other_families_raises(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = families.shared_folder(family, tmp_path_factory)
    with raises_code("unsupported-setting", file=folder, field="image_aspect_ratio"):
        load_processor(folder, image_aspect_ratio="pad")
