"""Exports a training run as a plain model folder for transformers and the tools built on it."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path
from uuid import uuid4

from vlm_unlearn.errors import UserError
from vlm_unlearn.modeling.adapters import adapter_base, is_adapter
from vlm_unlearn.modeling.loader import (
    DTYPES,
    find_local_model,
    load_processor,
    load_run_model,
    run_digest,
    run_model_folder,
    saved_precision,
)
from vlm_unlearn.modeling.older_readers import add_older_forms
from vlm_unlearn.modeling.processors import save_processor
from vlm_unlearn.store import RunDirectory, is_alive, package_versions, read_json, user_path, write_json, write_text


def export_run(run: Path, out: Path, precision: str, card: str) -> Path:
    """Merges a run's adapters and writes weights, processor, chat template, model card and the run's manifest.

    Settings that transformers 4 and vLLM read in other files or under other keys are written there too.
    Adapters are merged in float32 and the sum is rounded once.

    Args:
        run: The folder of a finished training run.
        out: The output folder. It must be empty or not exist.
        precision: ``fp32``, ``bf16``, or ``auto`` for that of the base model (LoRA) or of the run (full training).
        card: The text of the model card, written as README.md.

    Returns:
        The absolute path of the output folder.

    Raises:
        UserError: `out` is not empty or not writable, or `run` is not a finished training run.
    """
    out = user_path(out).absolute()
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError("is a link or a file. Choose another output folder.", code="output-exists", file=out)
    if out.exists() and any(out.iterdir()):
        raise UserError("is not empty. Choose another output folder.", code="output-exists", file=out)
    if out.resolve().is_relative_to(run.resolve()):
        raise UserError(
            "is inside the folder of the run. Choose another output folder.", code="output-not-writable", file=out
        )
    remove_leftovers(out.parent)
    scratch = out.with_name(f".{out.name[:100]}.{uuid4().hex[:12]}.{os.getpid()}.part")
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"cannot be created ({error.strerror}). Choose another output folder.", code="output-not-writable", file=out
        ) from None
    try:
        _write_model(run, scratch, precision, card)
        if out.exists():
            out.rmdir()
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def remove_leftovers(parent: Path) -> None:
    """Deletes the temporary folders in `parent` of exports that were killed. Those of running exports stay."""
    for folder in parent.glob(".*.part"):
        match = re.fullmatch(r"\..+\.[0-9a-f]{12}(?:\.(\d+))?\.part", folder.name)
        if match is None or folder.is_symlink() or not folder.is_dir():
            continue
        # The folders of earlier releases have no process id. An export takes less than a day.
        is_old = time.time() - folder.stat().st_mtime > 86_400
        if is_old if match[1] is None else not is_alive(int(match[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _write_model(run: Path, out: Path, precision: str, card: str) -> None:
    model_folder = run_model_folder(str(run))
    run_digest(model_folder)  # raises an error if the base model of the adapters has changed
    model, processor = load_run_model(model_folder, "fp32")
    model = model.to(DTYPES[saved_precision(model_folder) if precision == "auto" else precision])
    model.save_pretrained(str(out))
    save_processor(processor, out)
    add_older_forms(out, processor, find_local_model(_base_name(run, model_folder)))
    load_processor(out)  # checks that the exported processor loads
    write_text(out / "README.md", card)
    manifest = RunDirectory(run).read_manifest()
    write_json(out / "unlearning_manifest.json", {**manifest, "exported_with": package_versions()})


def _base_name(run: Path, model_folder: Path) -> str:
    """Returns the folder or hub name of the run's base model."""
    if is_adapter(model_folder):
        return adapter_base(model_folder)
    return str(read_json(RunDirectory(run).recipe_file)["model"])
