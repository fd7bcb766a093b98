"""Images are shown as viewers show them: orientation, deep samples, transparency, metadata, and truncated JPEGs."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin

from helpers import raises_code
from vlm_unlearn.data.encoding import Turn, encode
from vlm_unlearn.data.images import image_reference, image_size, open_image
from vlm_unlearn.generation.chat import ChatRequest
from vlm_unlearn.modeling.loader import load_processor
from vlm_unlearn.reporting.answers.thumbnails import write_thumbnails

WHITE, RED, GREEN = (255, 255, 255), (255, 0, 0), (0, 255, 0)
RAMP = np.arange(256).reshape(1, 256)


def corners() -> Image.Image:
    """A picture that differs under every rotation and reflection. Its grays survive JPEG and AVIF."""
    image = Image.new("RGB", (64, 48), (128, 128, 128))
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, 0, 15, 15], fill=(240, 240, 240))
    draw.rectangle([48, 0, 63, 15], fill=(16, 16, 16))
    return image


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def oriented(kind: str, tag: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = tag
    options = {"quality": 95} if kind in ("JPEG", "AVIF") else {"lossless": True} if kind == "WEBP" else {}
    return encoded(corners(), kind, exif=exif, **options)


def pixels(content: Any, **options: Any) -> np.ndarray[Any, Any]:
    return np.asarray(open_image(image_reference(content), **options)).astype(int)


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_orientation_is_applied(kind: str, tag: int) -> None:
    content = oriented(kind, tag)
    exif = Image.Exif()
    exif[0x0112] = tag
    expected = corners()
    expected.info["exif"] = exif.tobytes()
    shown = ImageOps.exif_transpose(expected)
    assert image_size(image_reference(content)) == shown.size
    assert np.abs(pixels(content) - np.asarray(shown)).mean() < 4
    small = open_image(image_reference(content), max_side=32)
    assert max(small.size) == 32
    assert (small.width > small.height) == (shown.width > shown.height)
    # A decoded image in memory is shown like its file.
    assert np.array_equal(pixels(Image.open(io.BytesIO(content))), pixels(content))


@pytest.mark.parametrize("value", [0, 9, 257])
def test_impossible_orientation_is_ignored(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert image_size(image_reference(encoded(corners(), "JPEG", exif=exif))) == (64, 48)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense", b"x" * 50])
def test_broken_metadata_is_ignored(exif: bytes) -> None:
    content = encoded(corners(), "JPEG", exif=exif)
    assert open_image(image_reference(content)).size == image_size(image_reference(content)) == (64, 48)


def test_images_that_differ_in_orientation_only_are_different() -> None:
    images = [Image.open(io.BytesIO(oriented("PNG", tag))) for tag in (1, 3, 6)]
    assert len({image_reference(image).digest for image in images}) == 3


DEEP: dict[str, Any] = {
    "16-bit PNG": lambda: encoded(Image.fromarray((RAMP * 257).astype(np.uint16)), "PNG"),
    "16-bit TIFF, big-endian": lambda: encoded(
        Image.frombytes("I;16B", (256, 1), (RAMP * 257).astype(">u2").tobytes()), "TIFF"
    ),
    "32-bit TIFF with 16 bits": lambda: encoded(Image.fromarray((RAMP * 257).astype(np.int32)), "TIFF"),
    "32-bit TIFF with 32 bits": lambda: encoded(Image.fromarray((RAMP * 8_000_000).astype(np.int32)), "TIFF"),
    "32-bit TIFF with negative values": lambda: encoded(Image.fromarray(((RAMP - 128) * 10).astype(np.int32)), "TIFF"),
    "32-bit TIFF with 8 bits": lambda: encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    "float TIFF from 0 to 1": lambda: encoded(Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF"),
    "float TIFF from 0 to 255": lambda: encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "float TIFF from -1 to 1": lambda: encoded(Image.fromarray((RAMP / 127.5 - 1).astype(np.float32)), "TIFF"),
    "PIL I;16": lambda: Image.fromarray((RAMP * 257).astype(np.uint16)),
    "PIL I": lambda: Image.fromarray((RAMP * 257).astype(np.int32)),
    "PIL F": lambda: Image.fromarray((RAMP / 255).astype(np.float32)),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_samples_are_scaled(name: str) -> None:
    assert np.array_equal(pixels(DEEP[name]())[0], np.stack([RAMP[0]] * 3, axis=1))


def test_samples_that_are_not_numbers_are_black() -> None:
    values = np.array([[0.0, 1.0, np.nan, np.inf, -np.inf]], dtype=np.float32)
    assert pixels(Image.fromarray(values))[0, :, 0].tolist() == [0, 255, 0, 255, 0]
    assert pixels(Image.fromarray(np.full((1, 2), np.nan, np.float32)))[0, :, 0].tolist() == [0, 0]


def test_sixteen_bits_of_little_range_stay_dark() -> None:
    assert pixels(Image.fromarray(np.array([[0, 257 * 3]], np.uint16)))[0, :, 0].tolist() == [0, 3]


def transparent_palette() -> bytes:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, *RED])
    image.paste(0, (0, 0, 4, 8))
    return encoded(image, "PNG", transparency=0)


TRANSPARENT: dict[str, Any] = {  # the left half is transparent black, the right half is opaque red or white
    "RGBA": lambda: encoded(half(Image.new("RGBA", (8, 8), (*RED, 255)), (0, 0, 0, 0)), "PNG"),
    "RGBA, WebP": lambda: encoded(half(Image.new("RGBA", (8, 8), (*RED, 255)), (0, 0, 0, 0)), "WEBP", lossless=True),
    "tRNS of a palette": transparent_palette,
    "tRNS of RGB": lambda: encoded(half(Image.new("RGB", (8, 8), RED), (0, 0, 0)), "PNG", transparency=(0, 0, 0)),
    "GIF": lambda: encoded(half(Image.new("RGBA", (8, 8), (*RED, 255)), (0, 0, 0, 0)), "GIF"),
    "PIL RGBA": lambda: half(Image.new("RGBA", (8, 8), (*RED, 255)), (0, 0, 0, 0)),
    "PIL RGBa": lambda: half(Image.new("RGBA", (8, 8), (*RED, 255)), (0, 0, 0, 0)).convert("RGBa"),
}


def half(image: Image.Image, color: Any) -> Image.Image:
    image.paste(color, (0, 0, 4, 8))
    return image


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparency_is_composited_on_white(name: str) -> None:
    shown = open_image(image_reference(TRANSPARENT[name]()))
    assert (shown.mode, shown.getpixel((1, 4)), shown.getpixel((6, 4))) == ("RGB", WHITE, RED)


@pytest.mark.parametrize("mode", ["L", "1", "I;16"])
def test_transparent_gray_is_white(mode: str) -> None:
    values = {"L": 128, "1": 1, "I;16": 128 * 257}
    image = Image.new(mode, (8, 8), values[mode])
    image.paste(0, (0, 0, 4, 8))
    shown = open_image(image_reference(encoded(image, "PNG", transparency=0)))
    gray = 255 if mode == "1" else 128
    assert (shown.getpixel((1, 4)), shown.getpixel((6, 4))) == (WHITE, (gray,) * 3)


def test_partial_transparency_is_mixed_with_white() -> None:
    assert pixels(Image.new("RGBA", (2, 2), (0, 0, 0, 128)))[0, 0].tolist() == [127, 127, 127]
    assert pixels(Image.new("LA", (2, 2), (0, 128)))[0, 0].tolist() == [127, 127, 127]


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def with_chunk(name: bytes, body: bytes, at_end: bool) -> bytes:
    content = encoded(Image.new("RGB", (32, 32), RED), "PNG")
    position = content.rindex(b"IEND") - 4 if at_end else 33
    return content[:position] + chunk(name, body) + content[position:]


TEXT = zlib.compress(b"x" * (3 << 20))


@pytest.mark.parametrize("at_end", [False, True], ids=["before pixels", "after pixels"])
@pytest.mark.parametrize(
    ("name", "body"),
    [(b"zTXt", b"note\0\0" + TEXT), (b"iTXt", b"note\0\1\0\0\0" + TEXT), (b"iCCP", b"profile\0\0" + TEXT)],
)
def test_png_with_large_metadata_opens(name: bytes, body: bytes, at_end: bool, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(with_chunk(name, body, at_end))
    assert open_image(file).getpixel((5, 5)) == open_image(image_reference(file.read_bytes())).getpixel((5, 5)) == RED
    assert image_size(file) == (32, 32)


def test_png_with_many_texts_opens() -> None:
    info = PngImagePlugin.PngInfo()
    for number in range(80):  # more than Pillow's limit for all texts together
        info.add_text(f"note{number}", "x" * (1 << 20), zip=True)
    assert pixels(encoded(Image.new("RGB", (32, 32), RED), "PNG", pnginfo=info))[5, 5].tolist() == list(RED)


def test_large_metadata_does_not_hide_the_orientation() -> None:
    content = oriented("PNG", 6)
    content = content[:33] + chunk(b"zTXt", b"note\0\0" + TEXT) + content[33:]
    assert image_size(image_reference(content)) == open_image(image_reference(content)).size == (48, 64)


@pytest.fixture(scope="module", params=[False, True], ids=["baseline", "progressive"])
def photograph(request: pytest.FixtureRequest) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (15, 20, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC)
    return encoded(image, "JPEG", quality=90, progressive=request.param)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 100])
def test_jpeg_without_its_last_bytes_is_shown(count: int, photograph: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(photograph[:-count])
    shown, complete = pixels(tmp_path / "a.jpg"), pixels(photograph)
    assert np.array_equal(shown[:200], complete[:200]) or np.abs(shown - complete).mean() < 1
    assert image_size(tmp_path / "a.jpg") == (320, 240)
    with raises_code("invalid-image"):  # as LLaVA's loader
        open_image(tmp_path / "a.jpg", loader="llava")


def test_jpeg_without_half_of_its_bytes_is_broken() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (15, 20, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise).resize((320, 240)), "JPEG", quality=90)
    with raises_code("invalid-image"):
        open_image(image_reference(content[: len(content) // 2]))


def test_avif_is_a_supported_format(tmp_path: Path) -> None:
    corners().save(tmp_path / "a.avif", quality=95)
    assert np.abs(pixels(tmp_path / "a.avif") - np.asarray(corners())).mean() < 4


def test_all_users_get_the_same_pixels(tiny_model: Path, tmp_path: Path) -> None:
    """transformers (training and evaluation), servers and vLLM, and thumbnails."""
    files = {"a.jpg": oriented("JPEG", 6), "b.png": DEEP["16-bit PNG"](), "c.png": TRANSPARENT["RGBA"]()}
    processor = load_processor(tiny_model)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        shown = open_image(tmp_path / name)
        turn = Turn("x", tmp_path / name, "What?", None)
        expected = processor.image_processor([shown], return_tensors="pt")["pixel_values"]
        assert np.array_equal(encode(processor, [turn], "right")["pixel_values"], expected)
        url = ChatRequest("x", "What?", tmp_path / name).messages()[0]["content"][0]["image_url"]["url"]
        sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        assert (sent.mode, sent.info, sent.tobytes()) == ("RGB", {}, shown.tobytes())
        (thumbnail,) = write_thumbnails(tmp_path / "thumbnails", [(tmp_path, name)]).values()
        small = Image.open(tmp_path / "thumbnails" / thumbnail.file)
        assert small.size == shown.size
        assert np.abs(np.asarray(small).astype(int) - np.asarray(shown)).mean() < 3


def test_llava_loader_converts_the_mode_only(tiny_model: Path, tmp_path: Path) -> None:
    processor = load_processor(tiny_model)
    files = {"a.jpg": oriented("JPEG", 6), "b.png": DEEP["16-bit PNG"](), "c.png": TRANSPARENT["RGBA"]()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        published = Image.open(tmp_path / name).convert("RGB")
        assert open_image(tmp_path / name, loader="llava").tobytes() == published.tobytes()
        assert image_size(tmp_path / name, "llava") == published.size
        turn = Turn("x", tmp_path / name, "What?", None, image_loader="llava")
        expected = processor.image_processor([published], return_tensors="pt")["pixel_values"]
        assert np.array_equal(encode(processor, [turn], "right")["pixel_values"], expected)
        request = ChatRequest("x", "What?", tmp_path / name, image_loader="llava")
        url = request.messages()[0]["content"][0]["image_url"]["url"]
        assert Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).tobytes() == published.tobytes()
