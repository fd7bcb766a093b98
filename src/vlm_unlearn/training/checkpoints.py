"""The checkpoints of a run: their files, when they are complete, and to which run they belong.

A checkpoint contains the trainable parameters in ``trained.safetensors`` instead of the files of `save_pretrained`:
transformers 5.23 saves several VLM families under renamed keys and cannot load them back (its issue 43701).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vlm_unlearn.errors import RunError, UserError
from vlm_unlearn.store import read_json, write_json

COMPLETE = "complete.json"  # the file that is written last into a checkpoint
TRAINED = "trained.safetensors"  # the trainable parameters by name; the base model has the others


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trainable parameters of a model by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def save_trained(model: nn.Module, folder: Path) -> None:
    """Writes the trainable parameters of a model to ``trained.safetensors`` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: value.detach().contiguous() for name, value in trainable_parameters(model).items()}
    save_file(trained, folder / TRAINED)


def load_trained(model: nn.Module, folder: Path) -> None:
    """Loads the parameters that `save_trained` wrote.

    Raises:
        RunError: The file contains other parameters than those that the model trains.
    """
    trainable, saved = trainable_parameters(model), load_file(folder / TRAINED)
    if saved.keys() != trainable.keys():
        raise RunError(
            "the checkpoint contains other parameters than this run trains. Delete the run's folder and start again.",
            code="checkpoint-mismatch",
            file=folder,
        )
    with torch.no_grad():
        for name, value in saved.items():
            trainable[name].copy_(value)


def mark_complete(folder: Path, step: int, run_digest: str) -> None:
    """Writes ``complete.json`` into a checkpoint, with the sizes of its files and the digest of its run."""
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    write_json(folder / COMPLETE, {"step": step, "files": files, "run": run_digest})


def validate_same_run(folder: Path, run_digest: str) -> None:
    """Validates that a checkpoint belongs to a run. The checkpoints of other programs pass.

    Raises:
        UserError: The checkpoint has the digest of another run.
    """
    try:
        digest = read_json(folder / COMPLETE).get("run")
    except (UserError, AttributeError):
        digest = None  # another program's checkpoint, or an older version's
    if digest is not None and digest != run_digest:
        raise UserError(
            "belongs to another run: the method, the seed, the batch size, the number of steps or the data differ",
            code="run-mismatch",
            file=folder,
        )


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Returns the newest checkpoint whose files are complete, or None."""
    checkpoints = {}
    for marker in folder.glob(f"checkpoint-*/{COMPLETE}"):
        try:
            content = json.loads(marker.read_text(encoding="utf-8"))
            if all((marker.parent / name).stat().st_size == size for name, size in content["files"].items()):
                checkpoints[int(content["step"])] = marker.parent
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged marker or a missing file
            continue
    return checkpoints[max(checkpoints)] if checkpoints else None
