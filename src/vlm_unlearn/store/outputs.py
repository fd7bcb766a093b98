"""Output files of commands. A command replaces its own earlier outputs, but no file of somebody else."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from vlm_unlearn.errors import UserError
from vlm_unlearn.store.files import digest_text, read_json, validate_not_overwriting, write_json
from vlm_unlearn.store.folders import cache_folder


def validate_outputs(outputs: Iterable[Path], inputs: Iterable[str | Path | None], overwrite: bool = False) -> None:
    """Checks that a command may write its output files.

    A file may be written if it is missing or empty, or if `record_outputs` has recorded it and it has not changed
    since. `overwrite` also allows other files, but no inputs.

    Args:
        outputs: The files that the command writes.
        inputs: The files and folders that it reads.
        overwrite: Whether other existing files may be replaced.

    Raises:
        UserError: An output is an input, a folder or a device, or a file of somebody else.
    """
    outputs = list(outputs)
    validate_not_overwriting(outputs, inputs)
    for out in outputs:
        if not overwrite and out.exists() and out.stat().st_size and not is_recorded(out):
            raise UserError(
                "exists, and vlm-unlearn has not written it or somebody has changed it since. "
                "Choose another output, or pass --overwrite.",
                code="output-exists",
                file=out,
            )


def record_outputs(outputs: Iterable[Path]) -> None:
    """Records the size and the time of output files in the cache folder, so that the next run may replace them."""
    for out in outputs:
        with suppress(OSError, UserError):  # without the record, the next run needs --overwrite
            write_json(_record_file(out), _state(out))


def is_recorded(out: Path) -> bool:
    """Returns whether a file is as `record_outputs` has recorded it."""
    try:
        return bool(read_json(_record_file(out)) == _state(out))
    except (OSError, UserError):
        return False


def _record_file(out: Path) -> Path:
    return cache_folder() / "outputs" / f"{digest_text(str(out.resolve()))}.json"


def _state(out: Path) -> dict[str, object]:
    status = out.stat()
    return {"file": str(out.resolve()), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
