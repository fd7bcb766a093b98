"""The folder of a run: the names of its files, its manifest and its lock."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from vlm_unlearn.errors import UserError
from vlm_unlearn.store.files import MANIFEST, read_json, write_json
from vlm_unlearn.store.folders import lock_folder

PACKAGES = ("vlm-unlearn", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "pillow")


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


class RunDirectory:
    """The folder of a run: the paths of its files, its manifest and its lock.

    An object stands for its path wherever a path is accepted. Creating it neither reads nor writes a file.

    Args:
        path: The run folder. It can be missing.

    Attributes:
        path: The run folder.
        manifest_file: Identity, package versions and cost of the run.
        recipe_file: The recipe of a training run.
        trainable_file: The numbers of trained parameters by component of the model.
        log_file: The loss terms and the probes of the optimizer steps.
        loss_plot_file: The picture of the loss curves.
        model: The folder of the trained model or adapters. It exists once training is complete.
        checkpoints: The folder of the checkpoints. It is deleted when the run is finished.
        best_weights: The folder of the weights that a probe rated best. It is deleted when the run is finished.
        tensorboard: The folder of TensorBoard's logs.
    """

    CHECKPOINT_COMPLETE: ClassVar = "complete.json"  # the file that is written last into a checkpoint
    DEFENSE_STATE: ClassVar = "defenses.safetensors"  # of a checkpoint: for example the running mean of the weights
    TRAINED_WEIGHTS: ClassVar = "trained.safetensors"  # of a checkpoint: trainable parameters, by name
    METHOD_STATE: ClassVar = "method_state.safetensors"  # next to saved weights: tensors of the method

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.manifest_file = self.path / MANIFEST
        self.recipe_file = self.path / "recipe.json"
        self.trainable_file = self.path / "trainable.json"
        self.log_file = self.path / "log.jsonl"
        self.loss_plot_file = self.path / "loss.png"
        self.model = self.path / "model"
        self.checkpoints = self.path / "checkpoints"
        self.best_weights = self.path / "best"
        self.tensorboard = self.path / "tensorboard"

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def exists(self) -> bool:
        """Returns whether the folder has a manifest, so that it is the folder of a run."""
        return self.manifest_file.exists()

    @property
    def is_finished(self) -> bool:
        """Whether the run has started and its manifest marks it as finished.

        Raises:
            UserError: The manifest is invalid.
        """
        return self.exists() and bool(self.read_manifest()["finished"])

    def validate_contents(self) -> None:
        """Checks that a run can use the folder: it is missing, empty, or a run folder already.

        Raises:
            UserError: The path is a file, or a folder with other contents.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(
                "is a file, not a folder. Choose another output folder.", code="not-a-folder", file=self.path
            )
        if not self.exists() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
            raise UserError(
                f"is not empty and has no {MANIFEST}. Choose another output folder.",
                code="output-exists",
                file=self.path,
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Creates the folder and locks it for this process during the block.

        The operating system releases the lock of a killed process.

        Raises:
            UserError: As `validate_contents`. Another process has locked the folder, or it cannot be created.
        """
        self.validate_contents()
        with lock_folder(self.path):
            yield

    def open(self, identity: Mapping[str, object]) -> dict[str, Any]:
        """Starts or resumes the run and returns its manifest.

        Args:
            identity: Everything that determines the results of the run. A folder of a run with another identity is an
                error, so that two experiments never mix.

        Raises:
            UserError: The manifest has another identity, or the folder contains files but no manifest.
        """
        resolved = json.loads(json.dumps(identity, default=str))
        self.validate_contents()
        if self.exists():
            manifest = self.read_manifest()
            if manifest["identity"] != resolved:
                changed = ", ".join(_differences(manifest["identity"], resolved))
                raise UserError(
                    f"contains another run (different: {changed}). Choose another output folder or delete this one.",
                    code="run-mismatch",
                    file=self.path,
                )
            return manifest
        manifest = {
            "schema": 1,
            "identity": resolved,
            "versions": package_versions(),
            "wall_seconds": 0.0,
            "finished": False,
        }
        write_json(self.manifest_file, manifest)
        return manifest

    def read_manifest(self) -> dict[str, Any]:
        """Returns the manifest.

        Raises:
            UserError: The manifest is missing or invalid.
        """
        manifest = read_json(self.manifest_file)
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
                file=self.manifest_file,
            )
        return dict(manifest)

    def record(self, fields: Mapping[str, object]) -> None:
        """Sets fields of the manifest, such as settings that were resolved when the run started."""
        write_json(self.manifest_file, {**self.read_manifest(), **fields})

    def record_cost(
        self, wall_seconds: float, finished: bool = False, ended: Mapping[str, object] | None = None
    ) -> None:
        """Adds wall time to the manifest, and updates its peak memory.

        The cost of a run that was killed is a lower bound, because the time since the last call is lost.

        Args:
            wall_seconds: Seconds since the last call.
            finished: Whether to mark the run as finished.
            ended: Further fields of the manifest: the number of optimizer steps, and why the run stopped.
        """
        manifest = self.read_manifest()
        manifest["wall_seconds"] = round(manifest["wall_seconds"] + wall_seconds, 3)
        manifest["peak_memory_mb"] = max(manifest.get("peak_memory_mb", 0), peak_memory_mb())
        manifest["finished"] = manifest["finished"] or finished
        manifest.update(ended or {})
        write_json(self.manifest_file, manifest)


def _is_amount(value: object) -> bool:
    """Returns whether a JSON value is a sensible number. Python also parses NaN, Infinity and huge integers."""
    return isinstance(value, int | float) and 0 <= value < 1e15  # False for NaN


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
        kind = RunDirectory(path).read_manifest()["identity"].get("kind")
    except UserError:
        return ""
    return f"; it {_KINDS[kind].format(path, path)}" if kind in _KINDS else ""
