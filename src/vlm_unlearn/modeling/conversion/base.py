"""The contract between the formats of checkpoints and the command that converts them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch

from vlm_unlearn.errors import UserError
from vlm_unlearn.modeling.conversion.tensor_files import DTYPE_CODES, Stored, TensorInfo
from vlm_unlearn.plugins import CHECKPOINT_FORMATS
from vlm_unlearn.store import user_path

register = CHECKPOINT_FORMATS.register
TEMPLATES = ("llava-hf", "vicuna_v1")
ROWS_PER_BLOCK = 4096  # of an embedding, to compute its mean in float32


@dataclass(frozen=True)
class ConversionOptions:
    """Settings of a conversion besides the checkpoint itself.

    Attributes:
        base: The model that an adapter, a projector or a partial checkpoint belongs to: a folder or hub name.
        vision_tower: The folder or hub name of the CLIP model whose weights the checkpoint does not contain.
        precision: ``fp32``, ``bf16`` or ``fp16``, or ``auto`` for that of the checkpoint's language model.
        lora_alpha: The scale of LoRA matrices whose file does not contain it. None for that of the published code.
        template: The chat template of a LLaVA: ``llava-hf``, that of the models on the hub, or ``vicuna_v1``, with the
            system line of the original code.
    """

    base: str | None = None
    vision_tower: str | None = None
    precision: str = "auto"
    lora_alpha: float | None = None
    template: str = "llava-hf"


class LoraPair(NamedTuple):
    """The two matrices of LoRA for a linear layer. ``scale * b @ a`` is added to its weight."""

    a: Stored
    b: Stored
    scale: float


@dataclass(frozen=True)
class Weight:
    """A tensor of the converted model.

    Attributes:
        name: The name in the converted model.
        stored: The tensor of the checkpoint, or None if `fill` makes it.
        dtype: The data type to write.
        shape: The shape to write. It has more rows than `stored` if tokens are added to the vocabulary.
        lora: Matrices to add.
        fill: Makes a tensor that no file contains.
    """

    name: str
    stored: Stored | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    lora: LoraPair | None = None
    fill: Callable[[], torch.Tensor] | None = None

    @property
    def info(self) -> TensorInfo:
        """Data type and shape of the tensor to write."""
        return TensorInfo(self.dtype, self.shape)

    def compute(self) -> torch.Tensor:
        """Returns the tensor to write. Sums are computed in float32 and rounded once."""
        if self.stored is None:
            assert self.fill is not None
            return self.fill().to(self.dtype)
        tensor = self.stored.read()
        if self.lora is not None:
            update = self.lora.b.read().float() @ self.lora.a.read().float()
            tensor = update.mul_(self.lora.scale).add_(tensor)
        if tensor.dim() and self.shape[0] > tensor.shape[0]:
            tensor = _with_mean_rows(tensor.to(self.dtype), self.shape[0])
        return tensor.to(self.dtype)


def _with_mean_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Returns a matrix with further rows at its end, each the mean of the present ones."""
    total = torch.zeros(tensor.shape[1:], dtype=torch.float64)
    for start in range(0, len(tensor), ROWS_PER_BLOCK):
        total += tensor[start : start + ROWS_PER_BLOCK].double().sum(0)
    extended = torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype)
    extended[: len(tensor)] = tensor
    extended[len(tensor) :] = (total / len(tensor)).to(tensor.dtype)
    return extended


@dataclass(frozen=True)
class Conversion:
    """A conversion that is ready to be written.

    Attributes:
        format: The name of the format.
        weights: The tensors to write, in the order in which they are read.
        write_files: Writes config, processor and chat template into a folder.
        inputs: The files and folders that are read.
        notes: Sentences for the user, such as a setting that the format had and the result has not.
    """

    format: str
    weights: Sequence[Weight]
    write_files: Callable[[Path], None]
    inputs: Sequence[Path]
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def num_bytes(self) -> int:
        """The number of bytes of all tensors."""
        return sum(weight.info.num_bytes for weight in self.weights)


class CheckpointFormat(ABC):
    """A format of checkpoints.

    Attributes:
        summary: The format in a phrase, for error messages.
    """

    summary: ClassVar[str]

    @abstractmethod
    def matches(self, source: Path) -> bool:
        """Returns whether a file or folder has this format, by the names and configs in it."""

    @abstractmethod
    def read(self, source: Path, options: ConversionOptions) -> Conversion:
        """Returns the conversion of a file or folder.

        Raises:
            UserError: The checkpoint is incomplete or broken, or does not fit its base.
        """


def resolve_source(name: str) -> Path:
    """Returns the local file or folder of a checkpoint, downloaded from the hub if it is a hub name.

    Pickled weights are downloaded only if there are no safetensors.

    Raises:
        UserError: It is not found.
    """
    path = user_path(name)
    if path.exists():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix in (".bin", ".pt", ".safetensors"):
        raise UserError("no such file or folder. Check the path.", code="model-not-found", file=name)
    from huggingface_hub import snapshot_download

    from vlm_unlearn.modeling.loader import HUB_FILES

    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES))
        if not any(folder.glob("*.safetensors")) or any(folder.glob("adapter_config.json")):
            folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, "*.bin", "*.pt"]))
    except Exception as error:  # the client raises many types, all of which mean "not available"
        raise UserError(
            f"not found: there is no such file or folder, and the download from the hub failed "
            f"({type(error).__name__}). Check the name.",
            code="model-not-found",
            file=name,
        ) from None
    return folder


def is_hub_name(name: str) -> bool:
    """Returns whether a name in a file of somebody else can be looked up on the hub. Paths in such files are not."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~", "\\"))


def required_base(options: ConversionOptions, source: Path, contents: str) -> str:
    """Returns the name of the base model.

    Raises:
        UserError: It is missing.
    """
    if options.base is None:
        raise UserError(
            f"contains {contents}. Pass --base with the model that it belongs to.",
            code="missing-base",
            file=source,
            field="--base",
        )
    return options.base


def is_supported_dtype(info: TensorInfo) -> bool:
    """Returns whether a tensor holds plain floating-point weights."""
    return info.dtype in DTYPE_CODES and info.dtype.is_floating_point
