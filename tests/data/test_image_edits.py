"""The pixels of every image edit, and that all backends get them."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import raises_code
from vlm_unlearn.data.image_edits import apply_edits, edited_image
from vlm_unlearn.data.images import open_image
from vlm_unlearn.data.text_drawing import PAGE_SIDE
from vlm_unlearn.evaluation.prompts import prompts_digest
from vlm_unlearn.generation.base import build_requests
from vlm_unlearn.generation.chat import ChatRequest
from vlm_unlearn.generation.hf import make_batches
from vlm_unlearn.records import (
    BlankEdit,
    BrightnessEdit,
    CropEdit,
    ImageEdit,
    JpegEdit,
    NoiseEdit,
    Prompt,
    ResizeEdit,
    RotateEdit,
    TextEdit,
)

WIDTH, HEIGHT = 60, 40


@pytest.fixture
def picture() -> Image.Image:
    """A gradient of middle levels, which no small change clips."""
    x, y = np.meshgrid(np.linspace(90, 160, WIDTH), np.linspace(0, 20, HEIGHT))
    return Image.fromarray(np.stack([x + y, x, 200 - x], axis=-1).round().astype(np.uint8))


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


def test_noise_has_its_deviation_and_the_control_changes_as_much(picture: Image.Image) -> None:
    change = levels(apply_edits(picture, [NoiseEdit(std=8, seed=3)])) - levels(picture)
    assert abs(change.mean()) < 0.5
    assert 7.6 < change.std() < 8.4
    assert np.abs(np.corrcoef(change[..., 0].ravel(), change[..., 1].ravel())[0, 1]) < 0.1  # a draw per channel
    darker = levels(apply_edits(picture, [BrightnessEdit(shift=-8)])) - levels(picture)
    assert (darker == -8).all()
    other_seed = apply_edits(picture, [NoiseEdit(std=8, seed=4)])
    assert levels(other_seed).tolist() != levels(apply_edits(picture, [NoiseEdit(std=8, seed=3)])).tolist()


def test_noise_and_brightness_are_clipped(picture: Image.Image) -> None:
    assert apply_edits(picture, [BrightnessEdit(shift=255)]).getextrema() == ((255, 255),) * 3
    assert apply_edits(picture, [BrightnessEdit(shift=-255)]).getextrema() == ((0, 0),) * 3


def test_jpeg_loses_more_at_a_lower_quality(picture: Image.Image) -> None:
    noisy = apply_edits(picture, [NoiseEdit(std=20)]).convert("L").convert("RGB")  # colors have a lower resolution
    losses = [
        np.abs(levels(apply_edits(noisy, [JpegEdit(quality=quality)])) - levels(noisy)).mean() for quality in (10, 95)
    ]
    assert losses[0] > 3 * losses[1] > 0


def test_crop_keeps_the_pixels_of_its_rectangle(picture: Image.Image) -> None:
    cropped = apply_edits(picture, [CropEdit(left=0.25, top=0.5, width=0.5, height=0.25)])
    assert (levels(cropped) == levels(picture)[20:30, 15:45]).all()
    corner = apply_edits(picture, [CropEdit(left=1, top=1, width=0.001, height=0.001)])
    assert levels(corner).tolist() == levels(picture)[-1:, -1:].tolist()


def test_rotation_by_a_right_angle_is_exact_and_the_upright_canvas_has_its_size(picture: Image.Image) -> None:
    assert (levels(apply_edits(picture, [RotateEdit(degrees=90)])) == np.rot90(levels(picture))).all()
    turned = apply_edits(picture, [RotateEdit(degrees=30)])
    upright = apply_edits(picture, [RotateEdit(degrees=30, upright=True)])
    assert upright.size == turned.size
    left, top = (turned.width - WIDTH) // 2, (turned.height - HEIGHT) // 2
    assert (levels(upright)[top : top + HEIGHT, left : left + WIDTH] == levels(picture)).all()
    assert upright.getpixel((0, 0)) == turned.getpixel((0, 0)) == (255, 255, 255)


def test_resize_has_the_scaled_size_and_its_control_the_original_size(picture: Image.Image) -> None:
    assert apply_edits(picture, [ResizeEdit(scale=0.5)]).size == (30, 20)
    assert apply_edits(picture, [ResizeEdit(scale=0.001)]).size == (1, 1)
    restored = apply_edits(picture, [ResizeEdit(scale=0.1, restore=True)])
    assert restored.size == picture.size
    assert (levels(restored) != levels(picture)).any()


def test_resize_rejects_a_picture_that_is_too_large(picture: Image.Image) -> None:
    with raises_code("image-too-large"):
        apply_edits(picture, [ResizeEdit(scale=8)] * 4)


def test_blank_has_the_size_and_one_color(picture: Image.Image) -> None:
    blank = apply_edits(picture, [BlankEdit(color=(1, 2, 3))])
    assert (blank.size, blank.getextrema()) == (picture.size, ((1, 1), (2, 2), (3, 3)))


def ink(image: Image.Image, box: tuple[int, int, int, int] | None = None) -> int:
    """The number of black pixels."""
    return int((levels(image.crop(box) if box else image).max(axis=-1) < 60).sum())


def test_text_is_below_the_picture_on_it_or_on_a_page(picture: Image.Image) -> None:
    text = "A title\n1.\n2.\n3."
    below = apply_edits(picture, [TextEdit(text=text, layout="below")])
    height = round(HEIGHT * below.width / WIDTH)
    assert below.height > height
    assert (ink(below, (0, 0, below.width, height)), ink(below) > 100) == (0, True)
    on = apply_edits(picture, [TextEdit(text=text, layout="on")])
    assert (on.size, ink(on) > 100) == ((below.width, height), True)
    page = apply_edits(picture, [TextEdit(text=text)])
    assert (page.size, ink(page) > 100) == ((PAGE_SIDE, PAGE_SIDE), True)
    assert set(np.unique(levels(page)[-100:])) == {255}  # nothing of the picture is left


def test_text_wraps_and_shrinks_until_it_fits(picture: Image.Image) -> None:
    long = apply_edits(picture, [TextEdit(text="word " * 300, layout="page")])
    assert ink(long, (0, 0, 10, PAGE_SIDE)) == ink(long, (PAGE_SIDE - 10, 0, PAGE_SIDE, PAGE_SIDE)) == 0
    assert ink(long, (0, PAGE_SIDE - 10, PAGE_SIDE, PAGE_SIDE)) == 0
    for unfit in ("w" * 500, "word " * 800):
        with raises_code("unsupported-text"):
            apply_edits(picture, [TextEdit(text=unfit, layout="on")])


@pytest.mark.parametrize("text", ["你好", "مرحبا", "\U00013000"])
def test_text_without_glyphs_or_from_right_to_left_is_an_error(picture: Image.Image, text: str) -> None:
    with raises_code("unsupported-text"):
        apply_edits(picture, [TextEdit(text=text)])


def test_edits_are_applied_in_their_order(picture: Image.Image) -> None:
    text_last = apply_edits(picture, [BlankEdit(), TextEdit(text="A", layout="on")])
    text_first = apply_edits(picture, [TextEdit(text="A", layout="on"), BlankEdit()])
    assert (ink(text_last) > 0, ink(text_first)) == (True, 0)


EDITS: list[tuple[ImageEdit, ...]] = [
    (),
    (JpegEdit(quality=20),),
    (NoiseEdit(std=20),),
    (NoiseEdit(std=20, seed=1),),
    (NoiseEdit(std=20), JpegEdit(quality=20)),
    (JpegEdit(quality=20), NoiseEdit(std=20)),
]


def make_prompts(folder: Path, picture: Image.Image) -> list[Prompt]:
    picture.save(folder / "a.png")
    return [
        Prompt(id=str(n), group_id="g", set="s", kind="unsafe", question="Q?", image="a.png", image_edits=edits)
        for n, edits in enumerate(EDITS)
    ]


@pytest.mark.parametrize("loader", ["viewer", "llava"])
def test_every_backend_gets_the_edited_picture(picture: Image.Image, tmp_path: Path, loader: str) -> None:
    prompts = make_prompts(tmp_path, picture)
    requests = build_requests(prompts, {"s": tmp_path}, {}, loader)  # type: ignore[arg-type]
    for request, edits in zip(requests, EDITS, strict=True):
        assert request.image is not None
        expected = levels(apply_edits(picture, edits))
        assert (levels(open_image(request.image)) == expected).all()  # hf
        content = ChatRequest.of_prompt("p", request.prompt, request.image).messages()[0]["content"]  # servers, vllm
        data = base64.b64decode(content[0]["image_url"]["url"].split(",")[1])
        assert (levels(Image.open(io.BytesIO(data))) == expected).all()


def test_pictures_with_different_edits_are_different_pictures(picture: Image.Image, tmp_path: Path) -> None:
    prompts = make_prompts(tmp_path, picture)
    requests = build_requests([*prompts, *prompts], {"s": tmp_path}, {"s": 1})
    assert len({request.image for request in requests}) == len(EDITS)
    batches = make_batches(requests, 2)  # the two questions about one picture share a batch, and no others do
    assert [len({request.image for request in batch}) for batch in batches] == [1] * len(EDITS)
    digests = {prompts_digest([prompt.model_copy(update={"id": "0"})], {"s": tmp_path}) for prompt in prompts}
    assert len(digests) == len(EDITS)


def test_prompts_jsonl_describes_the_edits(picture: Image.Image, tmp_path: Path) -> None:
    for prompt in make_prompts(tmp_path, picture):
        again = Prompt.model_validate_json(prompt.model_dump_json())
        assert again == prompt
        assert edited_image(tmp_path / "a.png", again.image_edits) == edited_image(
            tmp_path / "a.png", prompt.image_edits
        )


@pytest.mark.parametrize("change", [{"image": None}, {"image_round": 1}, {"prefill": ""}], ids=str)
def test_prompts_that_contradict_themselves_are_invalid(
    picture: Image.Image, tmp_path: Path, change: dict[str, object]
) -> None:
    prompt = make_prompts(tmp_path, picture)[1]
    with pytest.raises(ValueError, match=r"image|prefill"):
        Prompt.model_validate({**prompt.model_dump(), **change})
