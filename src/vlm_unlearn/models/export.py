"""Turns a training run into a model folder that transformers, and what is built on it, loads as any other."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from uuid import uuid4

from vlm_unlearn.errors import UserError
from vlm_unlearn.models.loader import (
    DTYPES,
    load_processor,
    load_run_model,
    run_digest,
    run_model_folder,
    saved_precision,
)
from vlm_unlearn.store import package_versions, read_manifest, user_path, write_json, write_text


def export_run(run: Path, out: Path, precision: str, card: str) -> Path:
    """Merges a run's adapters and writes weights, processor with its chat template, the model card and the run's manifest.

    Adapters are merged in float32 and the sum is rounded once.

    Args:
        precision: ``fp32``, ``bf16``, or ``auto`` for that of the base model (LoRA) or of the run (full training).
        card: the README.md.

    Raises:
        UserError: `out` holds something, or `run` is no finished training run.
    """
    out = user_path(out).absolute()
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out}: is a link or a file; choose another output folder")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty; choose another output folder")
    if out.resolve().is_relative_to(run.resolve()):
        raise UserError(f"{out}: lies in the run's own folder; choose another output folder")
    part = out.with_name(f".{out.name[:100]}.{uuid4().hex[:12]}.part")
    try:
        part.mkdir(parents=True)  # under a name that nobody has: no folder of others is written into or deleted
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; choose another output folder") from None
    try:
        _write_model(run, part, precision, card)
        if out.exists():
            out.rmdir()
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _write_model(run: Path, part: Path, precision: str, card: str) -> None:
    folder = run_model_folder(str(run))
    run_digest(folder)  # refuses adapters whose base has changed
    wanted = saved_precision(folder) if precision == "auto" else precision
    model, processor = load_run_model(folder, "fp32")
    model = model.to(DTYPES[wanted])
    model.save_pretrained(str(part))
    processor.save_pretrained(str(part))
    load_processor(part)  # what is shipped must load
    write_text(part / "README.md", card)
    write_json(part / "unlearning_manifest.json", {**read_manifest(run), "exported_with": package_versions()})
