"""Loads image-text-to-text models of transformers, and their processors, from a folder or the Hugging Face Hub."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from vlm_unlearn.data.processor_call import Processor, panics_as_errors
from vlm_unlearn.errors import UserError
from vlm_unlearn.modeling.compatibility import match_processor, validate_rope, validate_rope_keys, validate_tied_head
from vlm_unlearn.modeling.size_limits import (
    limited_modules,
    validate_buffers,
    validate_config_sizes,
    validate_file_sizes,
    validate_image_sizes,
)
from vlm_unlearn.modeling.structure import Structure, find_structure
from vlm_unlearn.modeling.trial import check_processor_files
from vlm_unlearn.store import (
    RunDirectory,
    describe_path,
    digest_model,
    read_json,
    user_path,
    validate_header_size,
    validate_model_files,
)
from vlm_unlearn.store.model_files import BASE_MODEL_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_PACKED_WEIGHTS = 40  # quantized weights per stored number: 32 of 1 bit in an integer, and a margin
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def model_folder(name: str) -> Path:
    """Returns the local folder of a model: `name` itself, or the snapshot downloaded from the hub.

    Raises:
        UserError: The model is not found, or its folder does not contain safetensors weights.
    """
    folder = user_path(name)
    if not folder.is_dir():
        # A name on the hub has at most one slash. A longer one is a path, which is not looked up on the hub.
        if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError("model folder not found. Check the path.", code="model-not-found", file=name)
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, allow_patterns=HUB_FILES))
        except Exception as error:  # the client raises many types, all of which mean "not available"
            raise UserError(
                f"model not found: there is no such folder, and the download from the hub failed "
                f"({type(error).__name__}). Check the name.",
                code="model-not-found",
                file=name,
            ) from None
    trained_model = RunDirectory(folder).model
    if not (folder / "config.json").is_file() and trained_model.is_dir():
        raise UserError(
            f"is a training run, not a model. Pass {trained_model}, or a folder written by `vlm-unlearn export`.",
            code="invalid-model",
            file=folder,
        )
    if not (folder / "config.json").is_file():
        fix = "Pass a model folder in Hugging Face format."
        if any(folder.glob("checkpoint-*")):
            fix = "It contains the checkpoints of a trainer. Save the model with trainer.save_model(FOLDER)."
        raise UserError(f"contains no config.json. {fix}", code="invalid-model", file=folder)
    validate_file_sizes(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(
            "contains no weights (*.safetensors). Pickled weights are not supported.", code="invalid-model", file=folder
        )
    validate_model_files(folder)
    if (folder / "adapter_config.json").is_file():  # transformers would load the adapter too
        raise UserError(
            "contains adapter_config.json next to a model. Move the adapter to another folder, or merge it.",
            code="invalid-model",
            file=folder,
        )
    for file in weights:
        validate_header_size(file)
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError, RuntimeError) as error:  # a sparse file that does not fit the address space
            raise UserError(f"broken weights: {_first_line(error)}", code="invalid-model", file=file) from None
    return folder


def find_local_model(name: str) -> Path | None:
    """Returns the local folder with a model's config, without network access, or None if there is none."""
    folder = user_path(name)
    if not folder.is_dir() and not name.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except Exception:  # the client raises many types, all of which mean "not in the cache"
            return None
    return folder if (folder / "config.json").is_file() else None


def load_processor(model_path: Path, image_aspect_ratio: Literal["processor", "pad"] = "processor") -> Processor:
    """Loads the model's processor, which must have a chat template.

    Its files are tried in a process with limits first (`vlm_unlearn.modeling.trial`), once per version of the files.

    Saving it with ``save_pretrained`` and loading it again gives the same processor.

    Args:
        model_path: The model folder.
        image_aspect_ratio: ``processor`` uses the processor's own image settings. ``pad`` first pads images to squares,
            as in the training of LLaVA-1.5.

    Raises:
        UserError: The processor cannot be loaded or used within limits of time and memory, has no chat template,
            contradicts the model's config.json, or does not support padding.
    """
    from vlm_unlearn.modeling.processors import auto_processor, pad_to_squares

    check_processor_files(model_path)
    try:
        with panics_as_errors():
            processor = auto_processor(model_path)
    except UserError as error:
        error.file = error.file or model_path
        raise
    except Exception as error:  # broken tokenizer files raise many types
        raise UserError(
            f"the processor cannot be loaded: {_first_line(error)}", code="invalid-model", file=model_path
        ) from None
    if not getattr(processor, "chat_template", None):
        raise UserError(
            "the processor has no chat template. Add chat_template.jinja to the folder.",
            code="invalid-model",
            file=model_path,
        )
    validate_image_sizes(processor, model_path)
    if (model_path / "config.json").is_file():
        match_processor(processor, read_config(model_path), model_path)
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    if image_aspect_ratio == "pad":
        pad_to_squares(processor, model_path)
    return processor


def load_model(
    model_path: Path, precision: str, attn_implementation: str = "auto", in_4_bits: bool = False
) -> PreTrainedModel:
    """Loads the model in a precision.

    Args:
        model_path: The model folder.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        attn_implementation: The name of an attention implementation of transformers, or ``auto`` for its default.
        in_4_bits: Whether to quantize the linear layers of the language model to 4 bits (NF4, QLoRA, arXiv 2305.14314).

    Raises:
        UserError: transformers cannot load the folder as an image-text-to-text model, or its weights do not match its
            config.json.
    """
    from transformers import AutoModelForImageTextToText

    skeleton = model_skeleton(model_path)  # detects within moments what would fill the memory with random weights
    options: dict[str, Any] = {}
    if attn_implementation == "flex_attention":  # of benefit only to the language model, which has the masks
        options["attn_implementation"] = {
            name: "flex_attention" if name == "text_config" else "sdpa" for name in skeleton.config.sub_configs
        }
    elif attn_implementation != "auto":
        options["attn_implementation"] = attn_implementation
    if in_4_bits:
        options["quantization_config"] = _nf4_config(find_structure(skeleton), precision)
    try:
        model: Any
        model, loading_info = AutoModelForImageTextToText.from_pretrained(
            str(model_path),
            dtype=DTYPES[precision],
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        )
    except Exception as error:  # broken config.json files raise many types
        raise _cannot_load(error, model_path) from None
    missing_keys = sorted(loading_info["missing_keys"])
    if missing_keys:
        is_head = missing_keys == ["lm_head.weight"]
        advice = " Is tie_word_embeddings in config.json wrong?" if is_head else ""
        raise UserError(
            f"{len(missing_keys)} weights of config.json are missing from the weight files, for example "
            f"{missing_keys[0]}.{advice}",
            code="invalid-model",
            file=model_path,
            field="tie_word_embeddings" if is_head else None,
        )
    validate_tied_head(model, model_path)
    return model


def _nf4_config(structure: Structure, precision: str) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[precision],
        # The option applies to 4 bits as well.
        llm_int8_skip_modules=[*structure.vision, *structure.projectors, "lm_head"],
    )


def model_skeleton(model_path: Path) -> PreTrainedModel:
    """Returns the model without weights (on the meta device), to validate a request within moments.

    Raises:
        UserError: transformers cannot load the config as an image-text-to-text model, or it describes a model that is
            much larger than the weight files.
    """
    config = read_config(model_path)
    validate_rope(config, model_path)
    num_tensors, num_stored = _count_weights(model_path)
    skeleton: Any = build_skeleton(config, str(model_path), num_tensors)
    validate_buffers(skeleton, model_path)
    # If text_config is null or missing, transformers uses the family's default size: billions of weights.
    num_described = sum(parameter.numel() for parameter in skeleton.parameters())
    quantized = getattr(skeleton.config, "quantization_config", None) is not None
    if num_described > (MAX_PACKED_WEIGHTS if quantized else 2) * num_stored:
        raise UserError(
            f"config.json describes {num_described:,} weights, but the weight files contain {num_stored:,}. Check "
            "whether text_config or vision_config is missing or null, or a weight file is missing.",
            code="invalid-model",
            file=model_path,
        )
    return skeleton


def read_config(model_path: Path) -> PreTrainedConfig:
    """Returns the transformers config of a model folder.

    Raises:
        UserError: transformers cannot load it, or its settings of position embeddings contradict each other.
    """
    from transformers import AutoConfig

    validate_config_sizes(model_path)
    validate_rope_keys(model_path)
    try:
        # By default, transformers would ask on standard input whether to run Python code from the folder.
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(model_path), trust_remote_code=False)
    except Exception as error:  # broken config.json files raise many types
        raise _cannot_load(error, model_path) from None
    return config


def build_skeleton(config: PreTrainedConfig, name: str, num_tensors: int = 0) -> PreTrainedModel:
    """Builds the model of a config without weights (on the meta device).

    Args:
        config: The transformers config of the model.
        name: The model's name, for error messages.
        num_tensors: The number of tensors in the weight files, if there are some.

    Raises:
        UserError: It is not an image-text-to-text model, or has far more modules than its weight files can fill.
    """
    from transformers import AutoModelForImageTextToText

    try:
        with _without_zero3(), torch.device("meta"), limited_modules(num_tensors, name):
            skeleton: PreTrainedModel = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:
        raise _cannot_load(error, name) from None
    return skeleton


@contextmanager
def _without_zero3() -> Iterator[None]:
    """Within the block, transformers builds complete models. Under DeepSpeed ZeRO-3 it would shard them."""
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = reference() if reference is not None else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def _count_weights(model_path: Path) -> tuple[int, int]:
    """Returns the numbers of tensors and of weights in the weight files of a folder, according to their headers."""
    sizes: list[int] = []
    for file in model_path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            sizes += [math.prod(weights.get_slice(name).get_shape()) for name in weights.keys()]  # noqa: SIM118
    return len(sizes), sum(sizes)


def run_model_folder(name: str) -> Path:
    """Returns the folder with the weights to evaluate: a model or adapter folder.

    Args:
        name: A model folder, hub name, adapter folder, or the folder of a training run.

    Raises:
        UserError: The model is not found or invalid, or the training run is not finished.
    """
    folder = user_path(name)
    run = RunDirectory(folder)
    if run.exists() and not (folder / "config.json").is_file():
        if run.read_manifest()["identity"].get("kind") not in ("train", None):
            raise UserError(
                f"must be a model folder, a hub name, or the folder of a training run{describe_path(folder)}",
                code="invalid-model",
                file=name,
            )
        folder = run.model
        if not folder.is_dir():
            raise UserError(
                "this training run is not finished. Resume it by running the same `vlm-unlearn train` command again.",
                code="run-unfinished",
                file=name,
            )
    if (folder / "adapter_config.json").is_file():
        validate_file_sizes(folder)
        validate_model_files(folder)
        model_folder(adapter_base(folder))
        return folder
    return model_folder(str(folder) if folder.exists() else name)


def run_digest(model_path: Path) -> str:
    """Returns the digest of the weights in a model folder. For an adapter, it covers base model and adapter.

    Raises:
        UserError: The base model has changed since the adapter was trained.
    """
    if not (model_path / "adapter_config.json").is_file():
        return digest_model(model_path)
    base = model_folder(adapter_base(model_path))
    digest = digest_model(base)
    if (model_path / BASE_MODEL_FILE).is_file() and read_json(model_path / BASE_MODEL_FILE).get("digest") != digest:
        raise UserError(
            f"the adapters were trained on a base model that differs from the one now in {base}. Restore the original "
            "base model.",
            code="run-mismatch",
            file=model_path,
        )
    return f"{digest}+{digest_model(model_path)}"


def load_run_model(model_path: Path, precision: str) -> tuple[PreTrainedModel, Processor]:
    """Loads model and processor from a folder that `run_model_folder` returned. Adapters are merged into their base."""
    if not (model_path / "adapter_config.json").is_file():
        return load_model(model_path, precision), load_processor(model_path)
    from vlm_unlearn.modeling.adapters import load_adapter

    adapted = load_adapter(load_model(model_folder(adapter_base(model_path)), precision), model_path)
    return adapted.merge_and_unload(), load_processor(model_path)


def saved_precision(model_path: Path) -> str:
    """Returns the precision that a model's weights are saved in. For an adapter, it is that of its base model."""
    if (model_path / "adapter_config.json").is_file():
        model_path = model_folder(adapter_base(model_path))
    saved_dtype = getattr(read_config(model_path), "dtype", None)
    return next((precision for precision, dtype in DTYPES.items() if dtype == saved_dtype), "fp32")


def adapter_base(model_path: Path) -> str:
    """Returns the name of an adapter's base model.

    Raises:
        UserError: adapter_config.json does not contain it.
    """
    file = model_path / "adapter_config.json"
    base = read_json(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            "must name the base model of the adapter.",
            code="invalid-field",
            file=file,
            field="base_model_name_or_path",
        )
    return base


def resolve_precision(precision: str) -> str:
    """Returns `precision`, with ``auto`` replaced by ``bf16`` on a GPU and ``fp32`` on a CPU."""
    return ("bf16" if torch.cuda.is_available() else "fp32") if precision == "auto" else precision


def default_device() -> torch.device:
    """Returns the GPU of this process, selected by ``LOCAL_RANK``, or the CPU if there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _cannot_load(error: BaseException, file: Path | str) -> UserError:
    return UserError(f"transformers cannot load the model: {_first_line(error)}", code="invalid-model", file=file)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
