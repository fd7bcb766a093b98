"""The checkpoints of a run: their files, when they are complete, and to which run they belong.

A checkpoint contains the trainable parameters in ``trained.safetensors`` instead of the files of `save_pretrained`:
transformers 5.23 saves several VLM families under renamed keys and cannot load them back (its issue 43701).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vlm_unlearn.errors import RunError, UserError
from vlm_unlearn.methods.wrappers import Defense
from vlm_unlearn.store import RunDirectory, read_json, write_json


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trainable parameters of a model by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def save_trained(model: nn.Module, checkpoint: Path) -> None:
    """Writes the trainable parameters of a model to ``trained.safetensors`` in a checkpoint."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    trained = {name: value.detach().contiguous() for name, value in trainable_parameters(model).items()}
    save_file(trained, checkpoint / RunDirectory.TRAINED_WEIGHTS)


def load_trained(model: nn.Module, checkpoint: Path) -> None:
    """Loads the parameters that `save_trained` wrote.

    Raises:
        RunError: The file contains other parameters than those that the model trains.
    """
    trainable, saved = trainable_parameters(model), load_file(checkpoint / RunDirectory.TRAINED_WEIGHTS)
    if saved.keys() != trainable.keys():
        raise RunError(
            "the checkpoint contains other parameters than this run trains. Delete the run's folder and start again.",
            code="checkpoint-mismatch",
            file=checkpoint,
        )
    with torch.no_grad():
        for name, value in saved.items():
            trainable[name].copy_(value)


def save_defenses(defenses: Sequence[Defense], checkpoint: Path) -> None:
    """Writes the state of the defenses to ``defenses.safetensors`` in a checkpoint, if they have one."""
    state = {f"{index}.{name}": value for index, item in enumerate(defenses) for name, value in item.state().items()}
    if state:
        save_file(
            {name: value.detach().contiguous() for name, value in state.items()},
            checkpoint / RunDirectory.DEFENSE_STATE,
        )


def load_defenses(defenses: Sequence[Defense], checkpoint: Path, device: torch.device) -> None:
    """Loads the state that `save_defenses` wrote.

    Raises:
        RunError: The checkpoint contains no state, or that of other defenses.
    """
    file = checkpoint / RunDirectory.DEFENSE_STATE
    saved = load_file(file, device=str(device)) if file.is_file() else {}
    for index, defense in enumerate(defenses):
        prefix = f"{index}."
        state = {name[len(prefix) :]: value for name, value in saved.items() if name.startswith(prefix)}
        if bool(state) != bool(defense.state()):
            raise RunError(
                "the checkpoint is of a run with other defenses. Delete the run's folder and start again.",
                code="checkpoint-mismatch",
                file=checkpoint,
            )
        defense.load_state(state)


@dataclass(frozen=True)
class MemorySettings:
    """How a run saves memory, which rounds its results. A resumed run must do the same."""

    gradient_checkpointing: bool
    max_tokens: int | None  # of a pass, after memory was not enough for more. None if it always was


def mark_complete(checkpoint: Path, step: int, run_digest: str, memory: MemorySettings) -> None:
    """Writes ``complete.json`` into a checkpoint, with the sizes of its files and the digest of its run."""
    files = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.is_file()}
    content = {"step": step, "files": files, "run": run_digest, "memory": asdict(memory)}
    write_json(checkpoint / RunDirectory.CHECKPOINT_COMPLETE, content)


def read_memory_settings(checkpoint: Path) -> MemorySettings | None:
    """Returns how the run of a checkpoint saves memory, None if the checkpoint does not contain it."""
    try:
        return MemorySettings(**read_json(checkpoint / RunDirectory.CHECKPOINT_COMPLETE)["memory"])
    except (UserError, KeyError, TypeError):  # another program's checkpoint, or an older version's
        return None


def validate_same_run(checkpoint: Path, run_digest: str) -> None:
    """Validates that a checkpoint belongs to a run. The checkpoints of other programs pass.

    Raises:
        UserError: The checkpoint has the digest of another run.
    """
    try:
        digest = read_json(checkpoint / RunDirectory.CHECKPOINT_COMPLETE).get("run")
    except (UserError, AttributeError):
        digest = None  # another program's checkpoint, or an older version's
    if digest is not None and digest != run_digest:
        raise UserError(
            "belongs to another run: the method, the seed, the batch size, the number of steps or the data differ",
            code="run-mismatch",
            file=checkpoint,
        )


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """Returns the newest checkpoint whose files are complete, or None."""
    checkpoints = {}
    for marker in output_dir.glob(f"checkpoint-*/{RunDirectory.CHECKPOINT_COMPLETE}"):
        try:
            content = json.loads(marker.read_text(encoding="utf-8"))
            if all((marker.parent / name).stat().st_size == size for name, size in content["files"].items()):
                checkpoints[int(content["step"])] = marker.parent
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged marker or a missing file
            continue
    return checkpoints[max(checkpoints)] if checkpoints else None
