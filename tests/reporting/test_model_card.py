"""The model card: its front matter, its text, and the escaping of names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finished_runs import complies, make_run, unlearned
from helpers import raises_code
from vlm_unlearn.config import Recipe
from vlm_unlearn.evaluation.generate import saved_suite
from vlm_unlearn.evaluation.scoring import score_run
from vlm_unlearn.reporting.formatting import judged_by
from vlm_unlearn.reporting.model_card import (
    EVALUATED,
    NOT_EVALUATED,
    NOT_MEASURED,
    QUANTIZED_BASE,
    TRIED_OLDER_RELEASE,
    model_card,
)
from vlm_unlearn.store import RunDirectory, digest_model, package_versions, write_json

HOSTILE = "a\n---\nlicense: mit | <script>x</script> `y` \u202e\x00"


def training_run(folder: Path, model: str = "llava-hf/llava-1.5-7b-hf", mode: str = "lora") -> Path:
    """Writes the files of a training run that the card reads."""
    recipe = Recipe.model_validate(
        {"model": model, "data": "data", "output": str(folder), "method": "npo", "trainable": {"mode": mode}}
    )
    data = {"forget.jsonl": "f" * 64, "retain.jsonl": "e" * 64}
    RunDirectory(folder).open({"kind": "train", "model": "b" * 64, "data": data, "processes": 2, "precision": "bf16"})
    write_json(folder / "recipe.json", recipe.model_dump(mode="json"))
    (folder / "model").mkdir()
    write_json(folder / "model" / "adapter_config.json", {"r": 4})
    pair = {f"layer.lora_{name}.weight": torch.zeros(1) for name in "AB"}
    save_file(pair, folder / "model" / "adapter_model.safetensors")
    RunDirectory(folder).record_cost(1.0, finished=True, ended={"steps": 60})
    return folder


def evaluation(folder: Path, digest: str, answer=unlearned, name: str = "", **suite: object) -> Path:
    """Writes an evaluation of the weights with a digest."""
    make_run(folder, answer, **suite)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["identity"] = {"kind": "evaluate", "model": digest, "prompts": "c" * 64}
    write_json(folder / "manifest.json", manifest)
    score_run(folder, saved_suite(folder), name or folder.name)
    return folder


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return training_run(tmp_path / "run")


@pytest.fixture
def evaluations(trained: Path, tmp_path: Path) -> list[Path]:
    own = f"{'b' * 64}+{digest_model(trained / 'model')}"
    return [evaluation(tmp_path / "before", "b" * 64, complies), evaluation(tmp_path / "after", own)]


def test_model_card_front_matter_has_the_results_of_this_model(trained: Path, evaluations: list[Path]) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(model_card(trained, evaluations, "llama2")).data
    assert (data.license, data.base_model, data.library_name) == ("llama2", "llava-hf/llava-1.5-7b-hf", "transformers")
    assert (data.pipeline_tag, data.tags) == ("image-text-to-text", ["machine-unlearning", "safety", "npo"])
    assert data.model_name == "llava-1.5-7b-hf-npo"
    results = {result.metric_type: result for result in data.eval_results}
    assert set(results) == {"asr_attacked", "refusal_rate", "degenerate_rate"}  # without the base's results
    attacked = results["asr_attacked"]
    assert (attacked.metric_value, attacked.metric_name, attacked.task_type) == (
        0.1,
        "ASR attacked",
        "image-text-to-text",
    )
    assert (attacked.dataset_type, attacked.dataset_name, attacked.dataset_config) == (
        "vlguard",
        "attacked",
        "attacked",
    )
    assert attacked.dataset_args == {"prompts_sha256": "c" * 64}
    assert attacked.metric_args == {"low": 0.0396, "high": 0.2305, "n": 40, "failed": 0, "judge": "keyword"}


def test_model_card_text_has_rates_changes_and_settings(trained: Path, evaluations: list[Path]) -> None:
    card = model_card(trained, evaluations)
    assert "license:" not in card
    assert "before is the base model." in card
    assert "after is this model." in card
    assert "| before | 100.0 [91.2, 100.0] | **0.0** [0.0, 8.8] | **0.0** [0.0, 4.6] |" in card
    assert "| after | **10.0** [4.0, 23.1] | 25.0 [14.2, 40.2] | **0.0** [0.0, 4.6] |" in card
    changed = card.split("### Changes from the base model")[1].split("\n## ")[0]
    assert r"| after | ASR attacked | -90.0\* [-97.5, -80.0] | <0.001 | <0.001 | 40 | 0 | mcnemar |" in changed
    for text in (
        "| forget.jsonl | " + "f" * 64,
        "| base model | " + "b" * 64,
        "| optimizer steps | 60 |",
        "| batch | 1 x 1 x 2 process(es) |",
    ):
        assert text in card
    assert judged_by(["keyword"])[1] in card
    assert str(trained.parent) not in card


def test_model_card_two_models_with_one_name_raise(trained: Path, evaluations: list[Path]) -> None:
    for folder in evaluations:
        score_run(folder, saved_suite(folder), "same")
    with raises_code("duplicate-key", file=evaluations[1]) as caught:
        model_card(trained, evaluations)
    assert '"same"' in str(caught.value)


def test_model_card_other_model_is_in_the_tables_only(trained: Path, tmp_path: Path) -> None:
    card = model_card(trained, [evaluation(tmp_path / "rmu", "d" * 64)])
    assert "| rmu | 10.0 " in card
    assert "model-index" not in card
    assert "### " not in card


def test_model_card_other_weights_at_the_same_path_are_another_model(trained: Path, tmp_path: Path) -> None:
    """The digest of the weights decides, not the path. Without a digest, the path decides."""
    card = model_card(trained, [evaluation(tmp_path / "old", "d" * 64, model=str(trained))])
    assert "model-index" not in card
    assert "is this model" not in card
    served = model_card(trained, [evaluation(tmp_path / "served", "a server's model", model=str(trained))])
    assert "served is this model" in served


def test_model_card_states_whether_the_model_was_evaluated(trained: Path, evaluations: list[Path]) -> None:
    for card in (model_card(trained), model_card(trained, [evaluations[0]])):  # no evaluation, and only the base's
        assert NOT_EVALUATED in card
        assert EVALUATED not in card
        assert "has not been evaluated" in card
    card = model_card(trained, evaluations)
    assert EVALUATED in card
    assert NOT_EVALUATED not in card
    assert "has not been evaluated" not in card


@pytest.mark.parametrize("package", ["transformers", "torch", "safetensors"])
def test_model_card_names_the_versions_that_were_tried(package: str, trained: Path) -> None:
    card = model_card(trained)
    assert f"{package} {package_versions()[package]}" in card
    assert f"transformers {TRIED_OLDER_RELEASE}" in card


def test_model_card_benchmark_score_has_no_judge(trained: Path, evaluations: list[Path]) -> None:
    from huggingface_hub import ModelCard

    summary = json.loads((evaluations[1] / "summary.json").read_text())
    row = summary["rows"][0]
    row["metrics"]["vqav2"], row["judges"] = row["metrics"]["asr_attacked"], {"vqav2": ""}
    write_json(evaluations[1] / "summary.json", summary)
    results = {result.metric_type: result for result in ModelCard(model_card(trained, evaluations)).data.eval_results}
    assert "judge" not in results["vqav2"].metric_args
    assert results["asr_attacked"].metric_args["judge"] == "keyword"


def test_model_card_failed_comparison_is_stated_without_paths(trained: Path, tmp_path: Path) -> None:
    own = f"{'b' * 64}+{digest_model(trained / 'model')}"
    ungraded = evaluation(tmp_path / "before", "b" * 64)
    (ungraded / "verdicts-keyword.jsonl").unlink()
    card = model_card(trained, [ungraded, evaluation(tmp_path / "after", own)])
    assert "`vlm-unlearn compare`" in card
    assert str(tmp_path) not in card


def test_model_card_without_evaluation_and_with_local_base(tmp_path: Path) -> None:
    card = model_card(training_run(tmp_path / "run", model=str(tmp_path / "my base"), mode="qlora"))
    assert NOT_MEASURED[2] in card
    assert "# my base, trained with npo" in card
    assert "base_model:" not in card
    assert QUANTIZED_BASE in card
    assert str(tmp_path) not in card


def test_model_card_hostile_names_are_escaped(trained: Path, evaluations: list[Path], tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    score_run(evaluations[1], saved_suite(evaluations[1]), HOSTILE)
    summary = json.loads((evaluations[1] / "summary.json").read_text())
    summary["rows"][0]["metrics"]["<img src=x onerror=alert(1)> [x](http://evil)"] = summary["rows"][0]["metrics"].pop(
        "refusal_rate"
    )
    write_json(evaluations[1] / "summary.json", summary)
    card = model_card(trained, evaluations, "other\n---\n# x")
    read = ModelCard(card)
    assert read.data.license == "other\n---\n# x"
    assert read.text.lstrip().startswith("# llava-hf/llava-1.5-7b-hf, trained with npo")
    assert "<script>" not in card
    assert "\u202e" not in read.text
    assert "\x00" not in card
    assert "<img" not in read.text
    assert "[x](http" not in read.text
    assert "\nlicense: mit" not in card
    tables = [line for line in read.text.splitlines() if line.startswith("| a ")]
    assert {line.count("|") for line in tables} == {6, 9}  # rates, changes


def test_model_card_invalid_request_raises(trained: Path, tmp_path: Path) -> None:
    with raises_code("run-not-found", file=tmp_path):
        model_card(tmp_path)
    with raises_code("file-not-found", file=trained):
        model_card(trained, [trained])
    evaluated = make_run(tmp_path / "evaluation", complies)
    with raises_code("run-not-found", file=evaluated):
        model_card(evaluated)
