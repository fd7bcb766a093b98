"""The first of three steps: asks a suite's model all prompts, into a run folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from vlm_unlearn.config import Suite, validate
from vlm_unlearn.errors import RequestError
from vlm_unlearn.evaluation.prompts import image_roots, prompts_digest, suite_prompts
from vlm_unlearn.records import Prompt, Response
from vlm_unlearn.store import lock_run, note_cost, open_run, read_json, read_manifest, read_records, write_json, write_records

OnDone = Callable[[str, int, int], None]  # stage, done, all


def generate_run(suite: Suite, folder: Path, on_done: OnDone | None = None) -> None:
    """Asks the suite's model all prompts; writes prompts.jsonl, responses.jsonl, suite.json and manifest.json.

    Raises:
        RequestError: broken data, a model that can't be loaded, or a folder that holds another run.
    """
    from vlm_unlearn.generation.hf import generate
    from vlm_unlearn.models.loading import device, load_run_model, resolve_precision, run_digest, run_model_folder

    roots = image_roots(suite)
    prompts = suite_prompts(suite)
    model_path = run_model_folder(suite.model)
    precision = resolve_precision(suite.generation.precision)
    generation = {**suite.generation.model_dump(), "precision": precision}
    identity = {
        "kind": "evaluate",
        "model": run_digest(model_path),
        "prompts": prompts_digest(prompts, roots),
        "generation": generation,
    }
    with lock_run(folder):
        manifest = open_run(folder, identity)
        write_json(folder / "suite.json", suite.model_dump(mode="json"))
        if manifest["finished"]:
            return
        started = time.monotonic()
        write_records(folder / "prompts.jsonl", prompts)
        model, processor = load_run_model(model_path, precision)
        model.to(device()).eval()
        tell = None if on_done is None else lambda done, total: on_done("generate", done, total)
        generate(model, processor, prompts, roots, folder / "responses.jsonl", suite.generation, tell)
        note_cost(folder, time.monotonic() - started, finished=True)


def read_answers(folder: Path) -> tuple[dict[str, Prompt], list[Response]]:
    """A finished run's prompts by id, and its responses.

    Raises:
        RequestError: the folder holds no finished generation, or its files don't belong together.
    """
    if not (folder / "manifest.json").exists() or not read_manifest(folder)["finished"]:
        raise RequestError(f"{folder}: holds no finished answers; run `vlm-unlearn generate` first (it goes on where it stopped)")
    prompts = {prompt.id: prompt for prompt in read_records(folder / "prompts.jsonl", Prompt)}
    responses = list(read_records(folder / "responses.jsonl", Response))
    if not prompts or set(prompts) != {response.prompt_id for response in responses}:
        raise RequestError(f"{folder}: prompts.jsonl and responses.jsonl don't belong together; delete the folder and generate again")
    return prompts, responses


def saved_suite(folder: Path) -> Suite:
    """The suite that a run folder was made with."""
    return validate(Suite, read_json(folder / "suite.json"), str(folder / "suite.json"))
