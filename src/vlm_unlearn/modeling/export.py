"""Exports a training run as a plain model folder for transformers and the tools built on it."""

from __future__ import annotations

import glob
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from vlm_unlearn.errors import UserError
from vlm_unlearn.modeling.loader import (
    DTYPES,
    adapter_base,
    find_local_model,
    load_processor,
    load_run_model,
    run_digest,
    run_model_folder,
    saved_precision,
)
from vlm_unlearn.modeling.older_readers import add_older_forms
from vlm_unlearn.modeling.processors import save_processor
from vlm_unlearn.store import RunDirectory, package_versions, read_json, user_path, write_json, write_text

# Files of a tokenizer next to tokenizer.json, for readers other than transformers 5.
TOKENIZER_FILES = (
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
    "chat_template.json",
)


def export_run(run: Path, out: Path, precision: str, card: str) -> Path:
    """Merges a run's adapters and writes weights, processor, chat template, model card and the run's manifest.

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
    prefix = f".{out.name[:100]}."
    scratch = out.with_name(f"{prefix}{uuid4().hex[:12]}.part")  # unique, so that it is ours to delete
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"cannot be created ({error.strerror}). Choose another output folder.", code="output-not-writable", file=out
        ) from None
    try:
        # The operating system releases the lock of a killed export. The lock is next to the folder, not in the export.
        with FileLock(f"{scratch}.lock", timeout=0):
            _remove_leftovers(out.parent, prefix)
            _write_model(run, scratch, precision, card)
            if out.exists():
                out.rmdir()
            os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        Path(f"{scratch}.lock").unlink(missing_ok=True)
    return out


def _remove_leftovers(parent: Path, prefix: str) -> None:
    """Deletes the temporary folders of killed exports to the same output. Those of running exports are locked."""
    for folder in parent.glob(f"{glob.escape(prefix)}*.part"):
        lock_file = Path(f"{folder}.lock")
        is_temporary = re.fullmatch(r"[0-9a-f]{12}\.part", folder.name.removeprefix(prefix))
        if not is_temporary or folder.is_symlink() or not folder.is_dir() or not lock_file.exists():
            continue
        with suppress(Timeout, OSError), FileLock(lock_file, timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
            lock_file.unlink(missing_ok=True)


def _copy_tokenizer_files(model_folder: Path, out: Path) -> None:
    """Copies the tokenizer files of the base model that only older readers use and transformers 5 does not write."""
    if (model_folder / "adapter_config.json").is_file():
        base = find_local_model(adapter_base(model_folder))
    else:
        recipe = RunDirectory(model_folder.parent).recipe_file
        base = find_local_model(str(read_json(recipe)["model"])) if recipe.is_file() else None
    for name in TOKENIZER_FILES:
        if base is not None and (base / name).is_file() and not (out / name).exists():
            shutil.copyfile(base / name, out / name)


def _write_model(run: Path, out: Path, precision: str, card: str) -> None:
    model_folder = run_model_folder(str(run))
    run_digest(model_folder)  # raises an error if the base model of the adapters has changed
    model, processor = load_run_model(model_folder, "fp32")
    model = model.to(DTYPES[saved_precision(model_folder) if precision == "auto" else precision])
    model.save_pretrained(str(out))
    save_processor(processor, out)
    _copy_tokenizer_files(model_folder, out)
    add_older_forms(out)
    load_processor(out)  # checks that the exported processor loads
    write_text(out / "README.md", card)
    manifest = RunDirectory(run).read_manifest()
    write_json(out / "unlearning_manifest.json", {**manifest, "exported_with": package_versions()})
