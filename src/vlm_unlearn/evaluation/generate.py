"""Step one of an evaluation (generate, judge, score): generates the model's answers to a suite's prompts.

The run folder gets prompts.jsonl, responses.jsonl (in the order of the prompts), suite.json and manifest.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vlm_unlearn.config import Suite, apply_overrides, validate
from vlm_unlearn.distributed import ProcessGroup, process_group, world_size
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.evaluation.answers import (
    RESPONSES,
    failed_responses,
    merge_shards,
    remove_failed_responses,
    response_log,
    sort_responses,
)
from vlm_unlearn.evaluation.core import generate_missing
from vlm_unlearn.evaluation.prompts import image_roots, prompts_digest, suite_prompts
from vlm_unlearn.generation.base import BACKENDS, Backend, GenerationRequest, build_requests, evenly_spaced
from vlm_unlearn.plugins import invalid_plugin
from vlm_unlearn.records import Batching, Prompt, Response
from vlm_unlearn.store import (
    describe_path,
    lock_run,
    open_run,
    read_json,
    read_manifest,
    read_records,
    record_cost,
    write_json,
    write_records,
)

OnDone = Callable[[str, int, int], None]  # stage, items done, items in total
BATCHING = "batching.json"
# The keys of a suite that may change after its answers have been generated.
REJUDGEABLE_KEYS = ("judge", "judges", "metrics", "paper_compat", "paper_metrics")


def generate_run(suite: Suite, folder: Path, on_done: OnDone | None = None, verify_batching: int = 0) -> None:
    """Generates the model's answers to all prompts of a suite, into a run folder.

    The function can be called again with the same arguments. An interrupted run resumes, and a finished run generates
    failed answers again. Under torchrun or ``accelerate launch`` every process calls it: each generates some of the
    answers, and the first process writes the files of the run.

    Args:
        suite: The suite, with the model.
        folder: The run folder.
        on_done: Called with the stage and the number of finished and of all answers of this process.
        verify_batching: The number of answers to generate a second time, each in a batch of its own. ``batching.json``
            reports how many of them differ.

    Raises:
        UserError: The data are broken, the model cannot be loaded, or the folder contains another run.
        RunError: The server does not respond, or another process of the run has ended.
    """
    if world_size() > 1 and suite.generation.backend != "hf":
        raise UserError(
            f"the backend {suite.generation.backend} does its own batching. Start it as a single process.",
            code="unsupported-setting",
            field="generation.backend",
        )
    with process_group() as group:
        if group.rank == 0:
            _generate_as_main_process(suite, folder, on_done, verify_batching, group)
        elif group.broadcast(False):  # the value comes from the main process: whether answers are missing
            requests = _suite_requests(suite, suite_prompts(suite))
            _generate_missing(build_backend(suite), requests, folder, group, None)
            group.wait()


def build_backend(suite: Suite) -> Backend:
    """Returns the backend that a suite's ``generation.backend`` names.

    Raises:
        UserError: The model does not exist, or the backend is not installed.
    """
    name = suite.generation.backend
    backend = BACKENDS.load(name, "generation.backend")
    if not callable(backend):
        raise invalid_plugin("backend", name, backend, "a class", "generation.backend")
    return backend(suite.model, suite.generation)


def _suite_requests(suite: Suite, prompts: Sequence[Prompt]) -> list[GenerationRequest]:
    samples = {split.name: split.samples for split in suite.splits}
    return build_requests(prompts, image_roots(suite), samples)


def _generate_as_main_process(
    suite: Suite, folder: Path, on_done: OnDone | None, verify_batching: int, group: ProcessGroup
) -> None:
    """Opens the run folder, generates this process's share of the answers and writes the files of the run."""
    prompts = suite_prompts(suite)
    requests = _suite_requests(suite, prompts)
    backend = build_backend(suite)
    identity = {
        "kind": "evaluate",
        **backend.identity(),
        "prompts": prompts_digest(prompts, image_roots(suite)),
        "samples": {split.name: split.samples for split in suite.splits if split.samples > 1},
    }
    with lock_run(folder):
        open_run(folder, identity)
        save_suite(folder, suite)
        failed = failed_responses(folder)
        if failed:
            backend.check_available()  # before verdicts on the failed answers are deleted
            remove_failed_responses(folder, failed)
        incomplete = not read_manifest(folder)["finished"] or not _is_complete(folder, requests)
        if incomplete:
            write_records(folder / "prompts.jsonl", prompts)
            merge_shards(folder)
        if group.broadcast(incomplete):
            with _record_wall_time(folder):
                _generate_missing(backend, requests, folder, group, on_done)
                group.wait()
                merge_shards(folder)
                sort_responses(folder, [request.key for request in requests])
        if verify_batching:
            with _record_wall_time(folder):
                _verify_batching(backend, requests, folder, verify_batching, on_done)


def _is_complete(folder: Path, requests: Sequence[GenerationRequest]) -> bool:
    """Returns whether each request has exactly one answer. The file of a finished run may have been edited since."""
    file = folder / RESPONSES
    keys = [response.key for response in read_records(file, Response)] if file.exists() else []
    return sorted(keys) == sorted(request.key for request in requests)


@contextmanager
def _record_wall_time(folder: Path) -> Iterator[None]:
    """Adds the time that the block takes to the run's manifest, and marks the run finished."""
    started = time.monotonic()
    yield
    record_cost(folder, time.monotonic() - started, finished=True)


def _generate_missing(
    backend: Backend,
    requests: Sequence[GenerationRequest],
    folder: Path,
    group: ProcessGroup,
    on_done: OnDone | None,
) -> None:
    """Generates this process's share of the missing answers."""
    file = folder / RESPONSES
    answered = {response.key for response in read_records(file, Response)} if file.exists() else set()
    with response_log(folder, group) as log:
        generate_missing(
            backend,
            requests,
            log,
            answered,
            None if on_done is None else lambda done, total: on_done("generate", done, total),
            group.rank,
            group.size,
        )


def _verify_batching(
    backend: Backend, requests: Sequence[GenerationRequest], folder: Path, count: int, on_done: OnDone | None
) -> None:
    """Generates some answers again in batches of one, and writes how many of them differ to batching.json."""
    batched_texts = {
        response.key: response.text
        for response in read_records(folder / RESPONSES, Response)
        if response.text is not None
    }
    selected = evenly_spaced([request for request in requests if request.key in batched_texts], count)
    earlier = read_batching(folder)
    if earlier is not None and earlier.checked >= len(selected):
        return
    checked = flipped = 0
    for response in backend.run_one_by_one(selected):
        if response.text is not None:
            checked += 1
            flipped += response.text != batched_texts[response.key]
        if on_done:
            on_done("one by one", checked, len(selected))
    write_json(folder / BATCHING, Batching(checked=checked, flipped=flipped).model_dump())


def read_batching(folder: Path) -> Batching | None:
    """Returns the result of a run's batching check, or None if it was not run."""
    file = folder / BATCHING
    return validate(Batching, read_json(file), str(file)) if file.exists() else None


def generation_notes(folder: Path) -> list[str]:
    """Returns sentences for the user about a run's answers: how many failed, and how many change with batching."""
    responses = list(read_records(folder / RESPONSES, Response))
    failed = [response for response in responses if response.error is not None]
    notes = []
    if failed:
        notes.append(
            f"{len(failed)} of {len(responses)} answers failed (the first: {quoted(failed[0].error)}). "
            "Run the same command again to retry them."
        )
    batching = read_batching(folder)
    if batching is not None:
        notes.append(
            f"Batching changes {batching.flipped} of {batching.checked} answers that were generated again one by one."
        )
    return notes


def read_answers(folder: Path) -> tuple[dict[str, Prompt], list[Response]]:
    """Reads the prompts, by id, and the responses of a finished run.

    Raises:
        UserError: The folder does not contain a finished run, or its files do not match.
    """
    manifest = read_manifest(folder) if (folder / "manifest.json").exists() else None
    if manifest is None or not manifest["finished"]:
        raise UserError(
            f"the folder contains no finished answers{describe_path(folder)}. "
            "Run `vlm-unlearn generate` first; it resumes an interrupted run.",
            code="run-unfinished",
            file=folder,
        )
    if not (folder / "prompts.jsonl").is_file() or not (folder / RESPONSES).is_file():
        raise UserError(
            f"the folder contains no answers of a model{describe_path(folder)}", code="run-not-found", file=folder
        )
    prompts = {prompt.id: prompt for prompt in read_records(folder / "prompts.jsonl", Prompt)}
    responses = list(read_records(folder / RESPONSES, Response))
    samples = manifest["identity"].get("samples", {})
    if not isinstance(samples, dict) or not all(
        isinstance(count, int) and 0 < count <= 1000 for count in samples.values()
    ):
        raise UserError(
            "the file is not the manifest of an evaluation. Choose another folder.",
            code="invalid-field",
            file=folder / "manifest.json",
            field="samples",
        )
    expected_keys = {(prompt.id, sample) for prompt in prompts.values() for sample in range(samples.get(prompt.set, 1))}
    keys = {response.key for response in responses}
    if not prompts or len(responses) != len(expected_keys) or keys != expected_keys:
        raise UserError(
            "prompts.jsonl and responses.jsonl do not match. "
            "Run `vlm-unlearn generate` again as before; it generates the missing answers.",
            code="run-mismatch",
            file=folder,
        )
    return prompts, responses


def save_suite(folder: Path, suite: Suite) -> None:
    """Writes the explicitly set keys of a suite to ``suite.json``.

    Defaults are not written, because a judge takes its unset keys from the suite's default judge.
    """
    write_json(folder / "suite.json", suite.model_dump(mode="json", exclude_unset=True))


def saved_suite(folder: Path, overrides: Sequence[str] = ()) -> Suite:
    """Reads the suite of a run folder.

    Args:
        folder: The run folder.
        overrides: ``key=value`` for judges and metrics (`REJUDGEABLE_KEYS`). They are not written to the folder:
            `save_suite` does that, once judging with them has succeeded.

    Raises:
        UserError: The folder contains no suite, or an override would change the answers.
    """
    file = folder / "suite.json"
    if not file.is_file():
        raise UserError(
            f"not an evaluation, suite.json is missing{describe_path(folder)}. "
            "Pass a folder that `vlm-unlearn evaluate` or `generate` has written.",
            code="run-not-found",
            file=folder,
        )
    value = read_json(file)
    for override in overrides:
        key = override.partition("=")[0].partition(".")[0].strip()
        if Suite.renamed_keys.get(key, key) not in REJUDGEABLE_KEYS:
            raise UserError(
                f"the override {quoted(override)} would change answers that have been generated already. "
                f"Only these keys can change: {', '.join(REJUDGEABLE_KEYS)}.",
                code="invalid-override",
                field=quoted(key)[1:-1],
            )
    return validate(Suite, apply_overrides(value, overrides, Suite) if isinstance(value, dict) else value, str(file))
