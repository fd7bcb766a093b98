"""Run folders: manifests, locks, atomic creation of folders, and the cache folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vlm_unlearn.errors import UserError
from vlm_unlearn.store.files import read_json, user_path, write_json

PACKAGES = ("vlm-unlearn", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "pillow")


def cache_folder() -> Path:
    """Returns the folder for reference values, image features, replies of judges and the demo's base models.

    It is ``$VLM_UNLEARN_CACHE``, or by default the platform's cache folder.
    """
    from platformdirs import user_cache_path

    configured = os.environ.get("VLM_UNLEARN_CACHE")
    return user_path(configured) if configured else user_cache_path("vlm-unlearn")


def package_versions() -> dict[str, str]:
    """Returns the installed versions of the packages that can influence results."""
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def peak_memory_mb() -> int:
    """Returns the peak resident memory of this process in MiB, or 0 if the platform does not report it."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where getrusage includes the memory of the parent process at the start of this one
        peaks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if peaks:
            return int(peaks[0]) // 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 * 1024 if sys.platform == "darwin" else 1024)


def open_run(folder: Path, identity: Mapping[str, object]) -> dict[str, Any]:
    """Starts or resumes a run folder and returns its manifest.

    Args:
        folder: The run folder.
        identity: Everything that determines the results of the run. A folder of a run with another identity is an
            error, so that two experiments never mix.

    Raises:
        UserError: The folder's manifest has another identity, or the folder contains files but no manifest.
    """
    path = folder / "manifest.json"
    resolved = json.loads(json.dumps(identity, default=str))
    validate_same_run(folder)
    if path.exists():
        manifest = read_manifest(folder)
        if manifest["identity"] != resolved:
            changed = ", ".join(_differences(manifest["identity"], resolved))
            raise UserError(
                f"contains another run (different: {changed}). Choose another output folder or delete this one.",
                code="run-mismatch",
                file=folder,
            )
        return manifest
    manifest = {
        "schema": 1,
        "identity": resolved,
        "versions": package_versions(),
        "wall_seconds": 0.0,
        "finished": False,
    }
    write_json(path, manifest)
    return manifest


def validate_same_run(folder: Path) -> None:
    """Checks that a path can become a run folder: it is new, empty, or a run folder already.

    Raises:
        UserError: The path is a file, or a folder with other contents.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError("is a file, not a folder. Choose another output folder.", code="not-a-folder", file=folder)
    if (
        folder.exists()
        and not (folder / "manifest.json").exists()
        and any(not entry.name.startswith(".") for entry in folder.iterdir())
    ):
        raise UserError(
            "is not empty and has no manifest.json. Choose another output folder.", code="output-exists", file=folder
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a run folder.

    Raises:
        UserError: The manifest is missing or invalid.
    """
    manifest = read_json(folder / "manifest.json")
    valid = (
        isinstance(manifest, dict)
        and isinstance(manifest.get("identity"), dict)
        and isinstance(manifest.get("finished"), bool)
        and _is_amount(manifest.get("wall_seconds"))
        and _is_amount(manifest.get("peak_memory_mb", 0))
    )
    if not valid:
        raise UserError(
            "is not the manifest of a run. Choose another folder.",
            code="invalid-manifest",
            file=folder / "manifest.json",
        )
    return dict(manifest)


def _is_amount(value: object) -> bool:
    """Returns whether a JSON value is a sensible number. Python also parses NaN, Infinity and huge integers."""
    return isinstance(value, int | float) and 0 <= value < 1e15  # False for NaN


_KINDS = {
    "train": "is a training run: `vlm-unlearn evaluate SUITE model={} --out DIR` evaluates it, "
    "and `vlm-unlearn export {} --out DIR` exports its model",
    "evaluate": "is an evaluation, for judge, score and compare",
    "attack search": "is an attack search",
    "demo": "is a demo: its training runs are in its folder runs, and its evaluations in its folder evaluations",
}


def describe_path(path: Path) -> str:
    """Returns a hint for an error message about the wrong kind of path, such as ``'; it is a training run: ...'``.

    The result is ``''`` for a path of an unknown kind.
    """
    if not path.exists():
        return "; it does not exist"
    if (path / "dataset.json").is_file():
        return "; it is a training set, for train's data="
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return "; it is a model folder, for model="
    try:
        kind = read_manifest(path)["identity"].get("kind")
    except UserError:
        return ""
    return f"; it {_KINDS[kind].format(path, path)}" if kind in _KINDS else ""


def record_cost(
    folder: Path, wall_seconds: float, finished: bool = False, ended: Mapping[str, object] | None = None
) -> None:
    """Adds wall time to the manifest of a run, and updates its peak memory.

    The cost of a run that was killed is a lower bound, because the time since the last call is lost.

    Args:
        wall_seconds: Seconds since the last call.
        finished: Whether to mark the run as finished.
        ended: Further fields of the manifest: the number of optimizer steps, and why the run stopped.
    """
    manifest = read_manifest(folder)
    manifest["wall_seconds"] = round(manifest["wall_seconds"] + wall_seconds, 3)
    manifest["peak_memory_mb"] = max(manifest.get("peak_memory_mb", 0), peak_memory_mb())
    manifest["finished"] = manifest["finished"] or finished
    manifest.update(ended or {})
    write_json(folder / "manifest.json", manifest)


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Locks a run folder for the block, as `lock_folder` does.

    Raises:
        UserError: As `lock_folder` and `validate_same_run`.
    """
    validate_same_run(folder)
    with lock_folder(folder):
        yield


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Creates a folder and locks it for this process during the block.

    The operating system releases the lock of a killed process.

    Raises:
        UserError: Another process has locked the folder, or the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{error.strerror}. Choose another output folder.", code="output-not-writable", file=folder
        ) from None
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError("another process is using this folder", code="run-locked", file=folder) from None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns the dotted keys whose values differ."""
    keys: list[str] = []
    for key in sorted(set(old) | set(new)):
        old_value, new_value = old.get(key), new.get(key)
        if isinstance(old_value, Mapping) and isinstance(new_value, Mapping):
            keys += _differences(old_value, new_value, f"{prefix}{key}.")
        elif old_value != new_value:
            keys.append(f"{prefix}{key}")
    return keys


@contextmanager
def build_atomically(folder: Path) -> Iterator[Path | None]:
    """Builds `folder` at most once, safe with several processes and after a kill at any moment.

    Other processes wait for the one that builds.

    Yields:
        An empty temporary folder to fill, which becomes `folder` when the block ends without an error. None if `folder`
        exists already.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            yield None
            return
        temporary = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        os.replace(temporary, folder)
