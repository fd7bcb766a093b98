"""Images have the pixels that viewers show, for training, generation, `data check` and thumbnails."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from helpers import raises_code
from vlm_unlearn.data.images import image_reference, image_size, llava_image, open_image
from vlm_unlearn.data.pixels import MAX_CHUNKS, displayed_size
from vlm_unlearn.generation.chat import ChatCache, ChatRequest, ChatResponse, OnChatResponse, complete_many
from vlm_unlearn.reporting.answers.thumbnails import write_thumbnails

ORIENTATION = 0x0112


def gradient(width: int = 64, height: int = 48) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1).astype(np.uint8))


def pixels(path: Path) -> Any:
    return np.asarray(open_image(path)).astype(int)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, bits: int, color: int, row: bytes, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, color, 0, 0, 0))
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", header, *extra, chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")]
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG", "AVIF"])
def test_orientation_is_applied(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 98}, "AVIF": {"quality": 98}}.get(kind, {})
    path = tmp_path / "a"
    gradient().save(path, format=kind, exif=exif, **lossless)
    tagged = gradient()
    tagged.getexif()[ORIENTATION] = orientation
    expected = ImageOps.exif_transpose(tagged)
    assert image_size(path) == open_image(path).size == expected.size
    assert np.abs(pixels(path) - np.asarray(expected)).mean() < (0.01 if kind in ("PNG", "TIFF", "WEBP") else 4)


def late_exif(*before: bytes) -> bytes:
    """A PNG with chunks behind its pixels, and then an orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    buffer = io.BytesIO()
    gradient().save(buffer, format="PNG")
    end = chunk(b"IEND", b"")
    return (
        buffer.getvalue().removesuffix(end)
        + b"".join(before)
        + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
        + end
    )


@pytest.mark.parametrize(
    ("data", "turned"),
    [
        (late_exif(), True),
        (late_exif(chunk(b"tEXt", b"comment\0eXIf")), True),
        (late_exif(*[chunk(b"tEXt", b"a\0b")] * 3 * MAX_CHUNKS), True),
        (late_exif().replace(b"eXIf", b"exIf"), False),
        (late_exif(chunk(b"IEND", b"")), False),
    ],
    ids=["at the end", "after a text that contains its name", "after many chunks", "another chunk", "after the end"],
)
def test_size_of_a_png_is_that_of_its_pixels(tmp_path: Path, data: bytes, turned: bool) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(data)
    assert image_size(path) == open_image(path).size == ((48, 64) if turned else (64, 48))


def test_size_needs_no_pixels(tmp_path: Path) -> None:
    class Counting(io.BytesIO):
        total = 0

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            self.total += len(data)
            return data

    buffer = io.BytesIO()
    Image.effect_noise((512, 512), 100).save(buffer, format="PNG")
    stream = Counting(buffer.getvalue())
    with Image.open(stream) as image:
        assert displayed_size(image) == (512, 512)
    assert stream.total < len(buffer.getvalue()) / 10


def test_thumbnails_and_cached_replies_depend_on_the_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An increased version makes those of the older decoder unused."""
    gradient().save(tmp_path / "a.png")
    reply = ChatRequest("0", "question", tmp_path / "a.png"), ChatRequest("1", "text only")
    cache, sent, names = ChatCache(tmp_path / "replies.sqlite"), [], set()

    class Echo:
        def identity(self) -> dict[str, object]:
            return {"model": "echo"}

        def run(self, requests: Iterable[ChatRequest], on_response: OnChatResponse) -> None:
            for request in requests:
                on_response(ChatResponse(request.id, "reply"))

    for version in (1, 1, 2):
        for module in ("generation.chat", "reporting.answers.thumbnails"):
            monkeypatch.setattr(f"vlm_unlearn.{module}.DECODER_VERSION", version)
        sent.append(complete_many(Echo(), reply, cache, lambda response: None))
        (thumbnail,) = write_thumbnails(tmp_path / "thumbnails", [(tmp_path, "a.png", ())]).values()
        names.add(thumbnail.file)
    assert sent == [2, 0, 1]
    assert len(names) == 2


@pytest.mark.parametrize("value", [0, 9, 999])
def test_invalid_orientation_is_ignored(tmp_path: Path, value: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    gradient().save(tmp_path / "a.png", exif=exif)
    assert (pixels(tmp_path / "a.png") == np.asarray(gradient())).all()


def test_pil_image_with_orientation_opens_like_its_file(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    gradient().save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        reference = image_reference(image)
    assert open_image(reference).tobytes() == open_image(tmp_path / "a.png").tobytes()
    assert reference.digest != image_reference(gradient()).digest


RAMP = np.arange(256)


@pytest.mark.parametrize(
    ("samples", "suffix"),
    [
        ((RAMP * 257).astype(np.uint16), "png"),
        ((RAMP * 257).astype(np.uint16), "tif"),
        ((RAMP * 257).astype(np.int32), "tif"),
        (RAMP.astype(np.int32), "tif"),
        ((RAMP * 2**20).astype(np.int32), "tif"),
        ((RAMP / 255).astype(np.float32), "tif"),
        (RAMP.astype(np.float32), "tif"),
        ((RAMP * 257.0).astype(np.float32), "tif"),
        ((RAMP * 1e6 - 5e7).astype(np.float32), "tif"),
    ],
)
def test_samples_of_more_than_8_bits_are_scaled(tmp_path: Path, samples: Any, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(samples.reshape(1, 256)).save(path)
    assert (pixels(path)[0, :, 0] == RAMP).all()


def test_floats_that_are_not_finite_do_not_change_the_others(tmp_path: Path) -> None:
    samples = np.array([[0.0, 0.5, 1.0, np.nan, np.inf]], np.float32)
    Image.fromarray(samples).save(tmp_path / "a.tif")
    assert pixels(tmp_path / "a.tif")[0, :, 0].tolist() == [0, 128, 255, 0, 255]


def test_16_bit_color_and_gray_are_equal(tmp_path: Path) -> None:
    (tmp_path / "gray.png").write_bytes(png(2, 16, 0, b"\x12\x34\xab\xcd"))
    (tmp_path / "color.png").write_bytes(png(2, 16, 2, b"\x12\x34" * 3 + b"\xab\xcd" * 3))
    assert (pixels(tmp_path / "gray.png") == pixels(tmp_path / "color.png")).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF", "AVIF"])
def test_transparent_pixels_are_white(tmp_path: Path, mode: str, kind: str) -> None:
    unsaved = {"PA": ("PNG", "WEBP", "GIF", "AVIF"), "P": ("TIFF", "GIF"), "LA": ("GIF",)}
    if kind in unsaved.get(mode, ()):
        pytest.skip("Pillow does not save this mode in this format with transparency")
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 16, 32))
    (image.quantize(4) if mode == "P" else image.convert(mode)).save(tmp_path / "a", format=kind)
    opened = pixels(tmp_path / "a")
    assert opened[16, 4].max() < 12
    assert opened[16, 28].min() > 243


def test_half_transparent_pixels_are_mixed_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert np.abs(pixels(tmp_path / "a.png")[0, 0] - [255, 127, 127]).max() <= 1


@pytest.mark.parametrize(
    ("bits", "color", "row", "key"),
    [
        (1, 0, b"\x40", b"\0\0"),
        (2, 0, b"\x2c", b"\0\0"),
        (4, 0, b"\x3f", b"\0\3"),
        (8, 0, b"\x30\xff", b"\0\x30"),
        (16, 0, b"\x30\x31\xff\xff", b"\x30\x31"),
        (8, 2, b"\1\2\3\xff\xff\xff", b"\0\1\0\2\0\3"),
        (16, 2, b"\1\1\2\2\3\3\xff\xff\xff\xff\xff\xff", b"\1\1\2\2\3\3"),
    ],
)
def test_transparent_color_of_a_png_is_white(tmp_path: Path, bits: int, color: int, row: bytes, key: bytes) -> None:
    (tmp_path / "opaque.png").write_bytes(png(2, bits, color, row))
    (tmp_path / "a.png").write_bytes(png(2, bits, color, row, chunk(b"tRNS", key)))
    assert pixels(tmp_path / "opaque.png")[0, 0].max() < 255
    assert pixels(tmp_path / "a.png")[0, 0].tolist() == [255, 255, 255]


def test_transparent_palette_entries_are_white(tmp_path: Path) -> None:
    palette = chunk(b"PLTE", b"\x10\x10\x10\x20\x20\x20")
    (tmp_path / "a.png").write_bytes(png(2, 8, 3, b"\0\1", palette, chunk(b"tRNS", b"\0")))
    assert pixels(tmp_path / "a.png")[0].tolist() == [[255] * 3, [32] * 3]


@pytest.mark.parametrize("place", ["text", "compressed text", "international text", "profile", "behind the pixels"])
def test_large_metadata_of_a_png_are_ignored(tmp_path: Path, place: str) -> None:
    info, options, path = PngImagePlugin.PngInfo(), {}, tmp_path / "a.png"
    if place == "text":
        for number in range(70):
            info.add_text(f"note{number}", "x" * 1_000_000)
    elif place == "compressed text":
        info.add_text("note", "x" * (2 << 20), zip=True)
    elif place == "international text":
        info.add_itxt("note", "x" * (2 << 20), zip=True)
    elif place == "profile":
        options = {"icc_profile": b"\0" * (3 << 20)}
    gradient().save(path, pnginfo=info, **options)
    if place == "behind the pixels":
        end = chunk(b"IEND", b"")
        text = chunk(b"zTXt", b"note\0\0" + zlib.compress(b"x" * (2 << 20)))
        path.write_bytes(path.read_bytes().removesuffix(end) + text + end)
    assert image_size(path) == (64, 48)
    assert (pixels(path) == np.asarray(gradient())).all()


@pytest.mark.parametrize("num_bytes", [1, 2, 3, 10, 40])
@pytest.mark.parametrize("size", [(48, 48), (640, 480), (33, 201)])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_short_of_its_last_bytes_opens(
    tmp_path: Path, num_bytes: int, size: tuple[int, int], progressive: bool
) -> None:
    gradient(*size).save(tmp_path / "complete.jpg", quality=95, progressive=progressive)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "complete.jpg").read_bytes()[:-num_bytes])
    changed = (pixels(tmp_path / "a.jpg") != pixels(tmp_path / "complete.jpg")).any(axis=(1, 2))
    assert not changed[: size[1] - 18].any() or progressive
    write_thumbnails(tmp_path / "thumbnails", [(tmp_path, "a.jpg", ())])


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_jpeg_that_lacks_rows_is_broken(tmp_path: Path, share: float) -> None:
    gradient(320, 240).save(tmp_path / "complete.jpg", quality=95)
    data = (tmp_path / "complete.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: 623 + int((len(data) - 623) * share)])
    with raises_code("invalid-image", file=tmp_path / "a.jpg"):
        open_image(tmp_path / "a.jpg")


def test_llava_loader_is_the_published_one(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    gradient().save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (4, 4), (1, 2, 3, 0)).save(tmp_path / "transparent.png")
    Image.fromarray((RAMP * 257).astype(np.uint16).reshape(16, 16)).save(tmp_path / "deep.png")
    for name in ("turned.jpg", "transparent.png", "deep.png"):
        path = tmp_path / name
        with Image.open(path) as image:
            published = image.convert("RGB")
        opened = open_image(llava_image(path))
        assert opened.size == image_size(llava_image(path)) == published.size
        assert opened.tobytes() == published.tobytes()
        assert opened.tobytes() != open_image(path).tobytes()


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([0.0, 1.0, float("nan"), float("inf"), float("-inf")], [0, 255, 0, 255, 0]),
        ([-1.0, 1.0, float("nan"), float("inf"), float("-inf")], [0, 255, 0, 255, 0]),
        ([float("nan"), float("nan")], [0, 0]),
    ],
)
def test_samples_that_are_not_numbers_are_dark(samples: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([samples], dtype=np.float32))
    shown = open_image(image_reference(image))
    assert np.asarray(shown)[0, :, 0].tolist() == expected
