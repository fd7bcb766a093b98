"""`image_loader` chooses the pixels of every backend and of training, and is part of the identity of a run."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.images import open_image
from vlm_unlearn.generation.base import build_requests
from vlm_unlearn.generation.chat import ChatRequest
from vlm_unlearn.generation.hf import _generation_identity
from vlm_unlearn.records import Prompt


@pytest.fixture
def turned(tmp_path: Path) -> Path:
    """A folder with a PNG of 40 x 20 pixels that viewers show upright, as 20 x 40."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 20), "red").save(tmp_path / "images" / "a.png", exif=exif)
    return tmp_path


@pytest.mark.parametrize(("loader", "size"), [("viewer", (20, 40)), ("llava", (40, 20))])
def test_all_backends_and_training_get_the_same_pixels(turned: Path, loader: str, size: tuple[int, int]) -> None:
    config = GenerationConfig.model_validate({"image_loader": loader})
    prompt = Prompt(id="p", set="s", group_id="p", kind="unsafe", question="Q?", image="a.png")
    (request,) = build_requests([prompt], {"s": turned / "images"}, {}, config.image_loader)
    assert request.image is not None
    assert open_image(request.image).size == size  # hf
    content = ChatRequest.of_prompt("p", prompt, request.image).messages()[0]["content"]  # openai and vllm
    url = next(part["image_url"]["url"] for part in content if part["type"] == "image_url")
    assert Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size == size
    rows = {role: [{"question": "Q?", "answer": "A.", "image": "a.png"}] for role in ("forget", "retain")}
    data = UnlearningDataset.from_datasets(rows, root=turned / "images")
    data.image_loader = config.image_loader
    image = data.image(data["forget"][0])
    assert image is not None
    assert open_image(image).size == size


def test_loader_is_part_of_the_identity_only_if_it_is_not_the_default() -> None:
    """The identity of runs of earlier versions does not change."""
    viewer = _generation_identity(GenerationConfig(), "fp32")
    assert "image_loader" not in viewer
    assert _generation_identity(GenerationConfig(image_loader="llava"), "fp32") != viewer
    assert json.loads(json.dumps(viewer)) == viewer
