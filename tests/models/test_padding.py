"""`image_aspect_ratio: pad`: images made square as LLaVA's own code does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import families
from vlm_unlearn.data.encoding import Processor
from vlm_unlearn.errors import UserError
from vlm_unlearn.models.loader import load_processor


def picture(tmp_path: Path, width: int, height: int) -> tuple[Image.Image, np.ndarray]:
    pixels = np.random.default_rng(1).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels), pixels


@pytest.mark.parametrize(("width", "height"), [(32, 20), (15, 32), (32, 32)])
def test_padding_is_llavas(width: int, height: int, tmp_path: Path) -> None:
    """LLaVA's own: a square of the longer side in the mean colour, the picture in its middle, the odd pixel after it.

    The longer side is the model's, so that nothing is resized and each pixel can be told.
    """
    families.build("llava", tmp_path / "model")
    image, pixels = picture(tmp_path, width, height)
    processor = load_processor(tmp_path / "model", image_aspect_ratio="pad")
    mean, deviation = (
        np.array([0.48145466, 0.4578275, 0.40821073]),
        np.array([0.26862954, 0.26130258, 0.27577711]),
    )  # CLIP's
    expected = np.empty((32, 32, 3))
    expected[:] = [122, 116, 104]  # the mean times 255, cut to whole numbers
    top, left = (32 - height) // 2, (32 - width) // 2
    expected[top : top + height, left : left + width] = pixels
    expected = (expected / 255 - mean) / deviation
    for one in (processor, _saved_and_loaded(processor, tmp_path / "saved")):
        assert one.image_processor.do_pad
        seen = one.image_processor([image], return_tensors="pt")["pixel_values"][0].permute(1, 2, 0)
        np.testing.assert_allclose(seen.numpy(), expected, atol=1e-5)
    plain = (
        load_processor(tmp_path / "model")
        .image_processor([image], return_tensors="pt")["pixel_values"][0]
        .permute(1, 2, 0)
    )
    assert np.allclose(plain.numpy(), expected, atol=1e-5) == (width == height)


def _saved_and_loaded(processor: Processor, folder: Path) -> Processor:
    processor.save_pretrained(folder)
    return load_processor(folder)


def test_padding_keeps_siglips_settings(tmp_path: Path) -> None:
    from transformers import SiglipImageProcessorPil

    families.build("llava", tmp_path / "model")
    processor = load_processor(tmp_path / "model")
    processor.image_processor = SiglipImageProcessorPil(
        size={"height": 48, "width": 48}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    processor.save_pretrained(tmp_path / "siglip")
    padding = load_processor(tmp_path / "siglip", image_aspect_ratio="pad")
    image, _ = picture(tmp_path, 48, 10)
    seen = padding.image_processor([image], return_tensors="pt")["pixel_values"][0]
    assert seen.shape == (3, 48, 48)
    np.testing.assert_allclose(seen[:, :19].numpy(), (127 / 255 - 0.5) / 0.25, atol=1e-5)


@pytest.mark.parametrize("family", [family for family in families.FAMILIES if family != "llava"])
def test_padding_is_refused_where_it_makes_no_sense(family: str, tmp_path: Path) -> None:
    families.build(family, tmp_path)
    with pytest.raises(
        UserError, match="image_aspect_ratio=pad is for LLaVA models with images of one square size, and this is a"
    ):
        load_processor(tmp_path, image_aspect_ratio="pad")
