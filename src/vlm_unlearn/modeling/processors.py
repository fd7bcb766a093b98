"""Loads processors without torchvision, and pads images to squares as in the training of LLaVA-1.5."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import transformers
from transformers import AutoImageProcessor, AutoProcessor, LlavaImageProcessorPil
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import VideoProcessorMixin

from vlm_unlearn.data.processor_call import Processor
from vlm_unlearn.errors import UserError
from vlm_unlearn.store import write_json

# The settings of an image processor for squares of a fixed size, without padding.
_SQUARE_SETTINGS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "do_convert_rgb"),
)


# PaliGemma and InstructBLIP have no chat template on the hub. These write the text of the models' training.
CHAT_TEMPLATES = {
    "PaliGemmaProcessor": (
        "{% for message in messages %}"
        "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
        "{% if loop.first %}{{ bos_token }}{% endif %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
        "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    ),
    "InstructBlipProcessor": (
        "{% for message in messages %}"
        "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
        "{% if loop.first %}{{ bos_token }}{% else %} {% endif %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
        "{{ eos_token if message['role'] == 'assistant' else '' }}{% endfor %}"
    ),
}


def auto_processor(model_path: Path) -> Processor:
    """Loads the processor of a folder. Images are processed with Pillow, so that results do not depend on torchvision.

    Without torchvision, the video processor that some families have is replaced by a stub. The stub is saved with the
    settings of the original. A processor without a chat template gets the one in `CHAT_TEMPLATES`.
    """
    processor_class = _processor_class(model_path)
    processor = _load_processor(model_path, processor_class)
    if not getattr(processor, "chat_template", None):
        file = model_path / "chat_template.jinja"  # InstructBLIP's processor does not load it
        default = CHAT_TEMPLATES.get(type(processor).__name__)
        processor.chat_template = file.read_text(encoding="utf-8") if file.is_file() else default
    return processor


def _load_processor(model_path: Path, processor_class: Any) -> Processor:
    if processor_class is None or "video_processor" not in processor_class.get_attributes():
        loader = AutoProcessor if processor_class is None or is_torchvision_available() else processor_class
        return loader.from_pretrained(str(model_path), backend="pil", trust_remote_code=False)
    if is_torchvision_available():
        # `backend` applies to all components, and no video processor supports Pillow. The image processor is replaced.
        processor = AutoProcessor.from_pretrained(str(model_path), trust_remote_code=False)
        processor.image_processor = AutoImageProcessor.from_pretrained(
            str(model_path), backend="pil", trust_remote_code=False
        )
        return processor
    # The class keeps its name, which is saved with the processor and looked up by transformers.
    stubbed_class: Any = type(processor_class.__name__, (_VideoStubMixin, processor_class), {})
    return stubbed_class.from_pretrained(str(model_path), backend="pil", trust_remote_code=False)


def save_processor(processor: Processor, folder: Path) -> None:
    """Saves a processor, with the same bytes whatever it has processed, and with the files that older readers use.

    transformers 4 and vLLM read ``preprocessor_config.json`` and ``video_preprocessor_config.json``. transformers 5
    puts their settings into ``processor_config.json``.

    Args:
        processor: The processor.
        folder: The folder to write to.
    """
    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    if backend is not None:  # each call of the tokenizer leaves its padding and truncation, which would be saved
        backend.no_padding()
        backend.no_truncation()
    processor.save_pretrained(str(folder))
    saved = _read_json(folder / "processor_config.json")
    for component, name in (
        ("image_processor", "preprocessor_config.json"),
        ("video_processor", "video_preprocessor_config.json"),
    ):
        settings = saved.get(component)
        if settings and not (folder / name).is_file():
            write_json(folder / name, {**settings, "processor_class": saved["processor_class"]})


def pad_to_squares(processor: Processor, model_path: Path) -> None:
    """Makes a LLaVA processor pad each image to a square with the mean color before resizing it.

    Size, crop, mean and deviation do not change.

    Source: ``image_aspect_ratio: pad`` in haotian-liu/LLaVA. The LLaVA-1.5 models are trained with it.

    Args:
        processor: The processor, changed in place.
        model_path: The model folder, for error messages.

    Raises:
        UserError: The processor is not a LLaVA processor with square images of one size.
    """
    image_processor = processor.image_processor
    supported = ("CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor")
    crops = getattr(image_processor, "do_center_crop", False)
    crop_size = getattr(image_processor, "crop_size", None) if crops else None
    size = crop_size or getattr(image_processor, "size", None) or {}
    is_square = size.get("height") is not None and size.get("height") == size.get("width")
    image_processor_class = type(image_processor).__name__
    if type(processor).__name__ != "LlavaProcessor" or not image_processor_class.startswith(supported) or not is_square:
        raise UserError(
            "pad requires a LLaVA model with square images of one size, but the model has a "
            f"{type(processor).__name__} with a {image_processor_class}. Use image_aspect_ratio=processor.",
            code="unsupported-setting",
            file=model_path,
            field="image_aspect_ratio",
        )
    settings = {
        name: getattr(image_processor, name)
        for name in _SQUARE_SETTINGS
        if getattr(image_processor, name, None) is not None
    }
    settings.setdefault("do_center_crop", False)  # the default of LlavaImageProcessor is True
    processor.image_processor = LlavaImageProcessorPil(do_pad=True, **settings)


class _VideoProcessorStub(VideoProcessorMixin):
    """Keeps the settings of a video processor that cannot be built without torchvision. It processes nothing."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings
        # SmolVLM's chat template reads these for images too.
        self.num_frames = settings.get("num_frames")
        self.fps = settings.get("fps")

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)


class _VideoStubMixin:
    """Mixin for a processor class of transformers that loads a stub in place of the video processor."""

    @classmethod
    def _get_arguments_from_pretrained(
        cls, model_path: str, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        components: list[Any] = []
        for name in cls.get_attributes():  # type: ignore[attr-defined]
            if name == "video_processor":
                components.append(_VideoProcessorStub(_video_settings(Path(model_path))))
            elif name == "tokenizer":
                components.append(cls._load_tokenizer_from_pretrained(name, model_path, **kwargs))  # type: ignore[attr-defined]
            elif name == "image_processor":
                components.append(AutoImageProcessor.from_pretrained(model_path, **kwargs))
            else:
                raise UserError(
                    f"the processor's component {name} cannot be loaded without torchvision. Install torchvision.",
                    code="missing-package",
                    file=model_path,
                )
        return components

    def check_argument_for_proper_class(self, name: str, argument: object) -> object:
        """Accepts the stub, for which transformers would look up a class that requires torchvision."""
        if isinstance(argument, _VideoProcessorStub):
            return _VideoProcessorStub
        return super().check_argument_for_proper_class(name, argument)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """Omits the video processor if its settings are empty."""
        saved: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        if not saved.get("video_processor"):
            saved.pop("video_processor", None)
        return saved


def _video_settings(model_path: Path) -> dict[str, Any]:
    """Returns the settings that transformers would use for the video processor, from the files in its order, or {}."""
    nested = _read_json(model_path / "processor_config.json").get("video_processor")
    return (
        nested
        or _read_json(model_path / "video_preprocessor_config.json")
        or _read_json(model_path / "preprocessor_config.json")
    )


def _processor_class(model_path: Path) -> Any:
    """Returns the processor class that AutoProcessor would choose, from the files in its order, or None."""
    for name in (
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "tokenizer_config.json",
    ):
        class_name = _read_json(model_path / name).get("processor_class")
        if class_name:
            return _import_processor(str(class_name))
    from transformers import AutoConfig

    if not (model_path / "config.json").is_file():
        return None
    config_class = type(AutoConfig.from_pretrained(str(model_path), trust_remote_code=False))
    processor_class = PROCESSOR_MAPPING.get(config_class, None)
    return None if processor_class is None else _import_processor(processor_class.__name__)


def _import_processor(class_name: str) -> Any:
    """Returns a processor class of transformers, or None.

    Pixtral's imports one function from a module that requires torchvision. The module for Pillow has the same function.
    """
    if class_name != "PixtralProcessor" or is_torchvision_available():
        return getattr(transformers, class_name, None)
    package = "transformers.models.pixtral"
    pillow_module = importlib.import_module(f"{package}.image_processing_pil_pixtral")
    with patch.dict(sys.modules, {f"{package}.image_processing_pixtral": pillow_module}):
        return importlib.import_module(f"{package}.processing_pixtral").PixtralProcessor


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
