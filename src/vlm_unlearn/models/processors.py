"""Processors as transformers makes them, also where it would want torchvision for videos, and LLaVA's padded images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoImageProcessor, AutoProcessor, LlavaImageProcessorPil
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import VideoProcessorMixin

from vlm_unlearn.data.encoding import Processor
from vlm_unlearn.errors import UserError

# What an image processor for fixed squares knows beside the padding.
_SQUARE_SETTINGS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "do_convert_rgb"),
)


def auto_processor(folder: Path) -> Processor:
    """The folder's processor, its images read with Pillow on every machine, so that results don't depend on torchvision.

    A processor that also knows videos gets a stand-in for that part where torchvision is missing; it is saved as it was found.
    """
    kind = _processor_class(folder)
    if kind is None or "video_processor" not in kind.get_attributes():
        return AutoProcessor.from_pretrained(str(folder), backend="pil", trust_remote_code=False)
    if is_torchvision_available():
        # The backend goes to all parts alike, and there is no video processor for Pillow: the image processor comes after.
        processor = AutoProcessor.from_pretrained(str(folder), trust_remote_code=False)
        processor.image_processor = AutoImageProcessor.from_pretrained(
            str(folder), backend="pil", trust_remote_code=False
        )
        return processor
    # The class keeps its name: it is saved with the processor, and plain transformers looks it up.
    without: Any = type(kind.__name__, (_WithoutVideos, kind), {})
    return without.from_pretrained(str(folder), backend="pil", trust_remote_code=False)


def pad_to_squares(processor: Processor, folder: Path) -> None:
    """Makes a LLaVA processor pad each image to a square with the mean colour before it resizes (``image_aspect_ratio: pad``).

    Source: the option of that name in haotian-liu/LLaVA; its 1.5 models are trained so. Size, crop, mean and deviation stay.

    Raises:
        UserError: the processor isn't LLaVA's with images of one square size.
    """
    images = processor.image_processor
    known = ("CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor")
    side = (
        (getattr(images, "crop_size", None) if getattr(images, "do_center_crop", False) else None)
        or getattr(images, "size", None)
        or {}
    )
    square = side.get("height") is not None and side.get("height") == side.get("width")
    if type(processor).__name__ != "LlavaProcessor" or not type(images).__name__.startswith(known) or not square:
        raise UserError(
            f"model {folder}: image_aspect_ratio=pad is for LLaVA models with images of one square size, and this is a "
            f"{type(processor).__name__} with {type(images).__name__}; use image_aspect_ratio=processor"
        )
    settings = {name: getattr(images, name) for name in _SQUARE_SETTINGS if getattr(images, name, None) is not None}
    settings.setdefault("do_center_crop", False)  # unset it would fall back to LlavaImageProcessor's own
    processor.image_processor = LlavaImageProcessorPil(do_pad=True, **settings)


class _NoVideoProcessor(VideoProcessorMixin):
    """Stands where a video processor would: keeps its settings for whoever has torchvision, processes nothing."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings
        # SmolVLM's chat template asks for these, with images too.
        self.num_frames = settings.get("num_frames")
        self.fps = settings.get("fps")

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)


class _WithoutVideos:
    """Comes before a processor class of transformers: all its parts are loaded as ever, but for the video processor."""

    @classmethod
    def _get_arguments_from_pretrained(
        cls, folder: str, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        parts: list[Any] = []
        for name in cls.get_attributes():  # type: ignore[attr-defined]
            if name == "video_processor":
                parts.append(_NoVideoProcessor(_video_settings(Path(folder))))
            elif name == "tokenizer":
                parts.append(cls._load_tokenizer_from_pretrained(name, folder, **kwargs))  # type: ignore[attr-defined]
            elif name == "image_processor":
                parts.append(AutoImageProcessor.from_pretrained(folder, **kwargs))
            else:
                raise UserError(
                    f"model {folder}: its processor has a part {name}, and no torchvision is there; install torchvision"
                )
        return parts

    def check_argument_for_proper_class(self, name: str, argument: object) -> object:
        """As transformers', which would look up a class that needs torchvision."""
        if isinstance(argument, _NoVideoProcessor):
            return _NoVideoProcessor
        return super().check_argument_for_proper_class(name, argument)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """As transformers', the video processor as it was found or not at all."""
        saved: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        if not saved.get("video_processor"):
            saved.pop("video_processor", None)
        return saved


def _video_settings(folder: Path) -> dict[str, Any]:
    """The settings plain transformers would load a video processor with, verbatim (its order of files); {} where there are none."""
    nested = _json(folder / "processor_config.json").get("video_processor")
    return nested or _json(folder / "video_preprocessor_config.json") or _json(folder / "preprocessor_config.json")


def _processor_class(folder: Path) -> Any:
    """The processor class that AutoProcessor would choose (its order of files), or None."""
    for name in (
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "tokenizer_config.json",
    ):
        found = _json(folder / name).get("processor_class")
        if found:
            return getattr(transformers, str(found), None)
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        return None
    return PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(str(folder), trust_remote_code=False)), None)


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}
