"""Loads any image-text-to-text model of transformers, and its processor, from a folder or the hub."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from vlm_unlearn.data.encoding import Processor
from vlm_unlearn.errors import UserError
from vlm_unlearn.models.layout import Layout, layout_of
from vlm_unlearn.store import describe_path, digest_model, read_json, read_manifest, user_path

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

BASE_MODEL_FILE = "base_model.json"  # beside adapters: the digest of the model they were trained on
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def model_folder(name: str) -> Path:
    """The local folder of a model: `name` itself, or where the hub's snapshot was downloaded to.

    Raises:
        UserError: there is no such folder and no such model on the hub, or the folder holds no safetensors weights.
    """
    folder = user_path(name)
    if not folder.is_dir():
        if folder.exists() or name.startswith((".", "/", "~")):
            raise UserError(f"model {name}: no such folder")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"])
            )
        except Exception as error:  # the hub's client raises many types, all of them "not available"
            raise UserError(
                f"model {name}: no such folder, and the hub did not give it ({type(error).__name__})"
            ) from None
    if not (folder / "config.json").is_file() and (folder / "model").is_dir():
        raise UserError(
            f"model {folder}: is a training run; pass {folder / 'model'}, or what `vlm-unlearn export` makes of it"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"model {folder}: no config.json; it must be a model folder in Hugging Face format")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"model {folder}: no weights (*.safetensors); pickled weights are not read")
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: broken weights: {_first_line(error)}") from None
    return folder


def find_local_model(name: str) -> Path | None:
    """Where a model's configuration lies on this machine, without asking a network; None where it doesn't."""
    folder = user_path(name)
    if not folder.is_dir() and not name.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except Exception:  # many types, all of them "not in the cache"
            return None
    return folder if (folder / "config.json").is_file() else None


def load_processor(folder: Path, image_aspect_ratio: Literal["processor", "pad"] = "processor") -> Processor:
    """The model's processor, which must have a chat template. Saved with ``save_pretrained`` and loaded again, it does the same.

    Args:
        image_aspect_ratio: ``processor`` leaves images to the processor's own settings; ``pad`` pads them to squares first, as
            LLaVA-1.5 was trained.

    Raises:
        UserError: the processor can't be loaded or has no chat template; padding makes no sense for it.
    """
    from vlm_unlearn.models.processors import auto_processor, pad_to_squares

    try:
        processor = auto_processor(folder)
    except UserError:
        raise
    except Exception as error:  # a broken tokenizer file raises whatever it breaks
        raise UserError(f"model {folder}: its processor can't be loaded: {_first_line(error)}") from None
    if not getattr(processor, "chat_template", None):
        raise UserError(f"model {folder}: its processor has no chat template; add chat_template.jinja to the folder")
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    if image_aspect_ratio == "pad":
        pad_to_squares(processor, folder)
    return processor


def load_model(
    folder: Path, precision: str, attn_implementation: str = "auto", in_4_bits: bool = False
) -> PreTrainedModel:
    """The model, in the precision asked for (``fp32`` or ``bf16``).

    Args:
        attn_implementation: transformers' name of one, or ``auto`` for what transformers chooses.
        in_4_bits: whether the language model's linear layers are held in 4 bits (NF4, QLoRA, arXiv 2305.14314).

    Raises:
        UserError: transformers can't load the folder as an image-text-to-text model, or its files don't hold what its
            config.json describes.
    """
    from transformers import AutoModelForImageTextToText

    skeleton = model_skeleton(folder)  # refuses in a moment what would fill the memory with random weights
    options: dict[str, Any] = {} if attn_implementation == "auto" else {"attn_implementation": attn_implementation}
    if in_4_bits:
        options["quantization_config"] = _four_bits(layout_of(skeleton), precision)
    try:
        model: Any
        model, loaded = AutoModelForImageTextToText.from_pretrained(
            str(folder),
            dtype=DTYPES[precision],
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        )
    except Exception as error:  # a broken config.json raises whatever it breaks
        raise UserError(f"model {folder}: transformers can't load it: {_first_line(error)}") from None
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise UserError(
            f"model {folder}: {len(missing)} weights of its config.json are in no file, such as {missing[0]}"
        )
    return model


def _four_bits(layout: Layout, precision: str) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[precision],
        llm_int8_skip_modules=[
            layout.vision_tower,
            layout.projector,
            "lm_head",
        ],  # the name says int8; 4 bits read it too
    )


def model_skeleton(folder: Path) -> PreTrainedModel:
    """The model without weights (on the meta device), to check a request against in a moment.

    Raises:
        UserError: transformers doesn't know the configuration as an image-text-to-text model, or it describes a model that the
            weight files can't fill.
    """
    skeleton: Any = build_skeleton(read_config(folder), str(folder))
    # A text_config that is null or missing means the family's default, billions of weights that are in no file.
    described, stored = sum(parameter.numel() for parameter in skeleton.parameters()), _stored_weights(folder)
    if described > 2 * stored and getattr(skeleton.config, "quantization_config", None) is None:
        raise UserError(
            f"model {folder}: its config.json describes {described:,} weights, its files hold {stored:,}; "
            "look whether text_config or vision_config is missing or null there, or a file of weights is missing"
        )
    return skeleton


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration in a model folder.

    Raises:
        UserError: transformers doesn't know it.
    """
    from transformers import AutoConfig

    try:
        # Left open, transformers would ask on standard input whether to run Python that came with the folder.
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # a broken config.json raises whatever it breaks
        raise UserError(f"model {folder}: transformers can't load it: {_first_line(error)}") from None
    return config


def build_skeleton(config: PreTrainedConfig, name: str) -> PreTrainedModel:
    """A model of a configuration, without weights.

    Raises:
        UserError: it is no image-text-to-text model.
    """
    from transformers import AutoModelForImageTextToText

    try:
        with _not_cut_up(), torch.device("meta"):
            skeleton: PreTrainedModel = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"model {name}: transformers can't load it: {_first_line(error)}") from None
    return skeleton


@contextmanager
def _not_cut_up() -> Iterator[None]:
    """Within the block models are made whole: under ZeRO-3 transformers cuts up each one while making it."""
    from transformers.integrations import deepspeed

    held = deepspeed._hf_deepspeed_config_weak_ref
    config = held() if held is not None else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def _stored_weights(folder: Path) -> int:
    """How many numbers the folder's weight files hold, from their headers."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118 (no dict)
    return count


def run_model_folder(name: str) -> Path:
    """Where the weights to evaluate lie: a model folder or hub name, an adapter folder, or a training run's folder.

    Raises:
        UserError: as `model_folder`; also for a training run that isn't finished.
    """
    folder = user_path(name)
    if (folder / "manifest.json").is_file() and not (folder / "config.json").is_file():
        if read_manifest(folder)["identity"].get("kind") not in ("train", None):
            raise UserError(
                f"model {name}: must be a model folder, a hub name, or a training run's folder{describe_path(folder)}"
            )
        folder = folder / "model"
        if not folder.is_dir():
            raise UserError(
                f"model {name}: this training run has no model yet; run `vlm-unlearn train` again, it goes on where it stopped"
            )
    if (folder / "adapter_config.json").is_file():
        model_folder(_adapter_base(folder))
        return folder
    return model_folder(str(folder) if folder.exists() else name)


def run_digest(folder: Path) -> str:
    """Digest of the weights in a model folder; for an adapter, of its base and its own.

    Raises:
        UserError: the adapter was trained on another base than lies there now.
    """
    if not (folder / "adapter_config.json").is_file():
        return digest_model(folder)
    base = model_folder(_adapter_base(folder))
    digest = digest_model(base)
    if (folder / BASE_MODEL_FILE).is_file() and read_json(folder / BASE_MODEL_FILE).get("digest") != digest:
        raise UserError(
            f"model {folder}: its adapters were trained on another base than {base} holds now; put the old one back"
        )
    return f"{digest}+{digest_model(folder)}"


def load_run_model(folder: Path, precision: str) -> tuple[PreTrainedModel, Processor]:
    """Model and processor from what `run_model_folder` found; an adapter is merged into its base."""
    if not (folder / "adapter_config.json").is_file():
        return load_model(folder, precision), load_processor(folder)
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load_model(model_folder(_adapter_base(folder)), precision), str(folder))
    return adapted.merge_and_unload(), load_processor(folder)


def saved_precision(folder: Path) -> str:
    """The precision that a model's weights are saved in; for an adapter, its base's."""
    if (folder / "adapter_config.json").is_file():
        folder = model_folder(_adapter_base(folder))
    dtype = getattr(read_config(folder), "dtype", None)
    return next((name for name, known in DTYPES.items() if known == dtype), "fp32")


def _adapter_base(folder: Path) -> str:
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder / 'adapter_config.json'}: base_model_name_or_path must name the base model")
    return base


def resolve_precision(wanted: str) -> str:
    """``auto`` is bf16 on a GPU and fp32 on a CPU."""
    return ("bf16" if torch.cuda.is_available() else "fp32") if wanted == "auto" else wanted


def default_device() -> torch.device:
    """The GPU of this process: the first, or where several were started together on a machine, one each; without any the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
