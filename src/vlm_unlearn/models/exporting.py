"""Turns a training run into a model folder that transformers, and what is built on it, loads as any other."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vlm_unlearn.errors import RequestError
from vlm_unlearn.models.loading import DTYPES, load_processor, load_run_model, run_digest, run_model_folder, saved_precision
from vlm_unlearn.store import package_versions, read_manifest, write_json, write_text


def export_run(run: Path, out: Path, precision: str, card: str) -> Path:
    """Merges a run's adapters and writes weights, processor with its chat template, the model card and the run's manifest.

    Adapters are merged in float32 and the sum is rounded once.

    Args:
        precision: ``fp32``, ``bf16``, or ``auto`` for that of the base model (LoRA) or of the run (full training).
        card: the README.md.

    Raises:
        RequestError: `out` holds something, or `run` is no finished training run.
    """
    out = out.expanduser().absolute()
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise RequestError(f"{out}: is a link or a file; choose another output folder")
    if out.exists() and any(out.iterdir()):
        raise RequestError(f"{out}: is not empty; choose another output folder")
    if out.is_relative_to(run.absolute()):
        raise RequestError(f"{out}: lies in the run's own folder; choose another output folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{out}: {error.strerror}; choose another output folder") from None
    folder = run_model_folder(str(run))
    run_digest(folder)  # refuses adapters whose base has changed
    wanted = saved_precision(folder) if precision == "auto" else precision
    model, processor = load_run_model(folder, "fp32")
    model = model.to(DTYPES[wanted])
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(str(part))
    processor.save_pretrained(str(part))
    load_processor(part)  # what is shipped must load
    write_text(part / "README.md", card)
    write_json(part / "unlearning_manifest.json", {**read_manifest(run), "exported_with": package_versions()})
    out.rmdir()
    os.replace(part, out)
    return out
