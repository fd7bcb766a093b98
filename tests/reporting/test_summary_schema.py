"""The published schema of summary.json is generated from the records and rejects other files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finished_runs import complies, make_run, unlearned
from helpers import raises_code
from vlm_unlearn.evaluation.comparison import compare_runs
from vlm_unlearn.evaluation.generate import saved_suite
from vlm_unlearn.evaluation.scoring import score_run
from vlm_unlearn.records import Summary
from vlm_unlearn.reporting.schema import summary_schema
from vlm_unlearn.reporting.summaries import read_summary

PUBLISHED = Path(__file__).parents[2] / "docs" / "summary.schema.json"
# As version 0.1 wrote it, before rows had judges, categories, rewrites and further fields.
OLD = {
    "schema": 1,
    "rows": [{"model": "npo", "metrics": {"asr": {"value": 0.0, "low": 0.0, "high": 0.02, "n": 180, "failed": 0}}}],
}


@pytest.fixture
def written(tmp_path: Path) -> list[dict[str, object]]:
    """Summaries as written to files: of one run with the published counting, of a comparison, and of an old version."""
    base, npo = make_run(tmp_path / "base", complies), make_run(tmp_path / "npo", unlearned)
    score_run(
        npo,
        saved_suite(npo, ["paper_compat=true", "paper_metrics.refusal_rate={splits: [safe], labels: [refused]}"]),
        "npo",
    )
    compared, _ = compare_runs({"base": base, "npo": npo})
    return [json.loads((npo / "summary.json").read_text()), json.loads(json.dumps(compared.model_dump())), OLD]


def test_published_schema_is_generated_from_the_records() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "vlm_unlearn.reporting.schema"], capture_output=True, text=True, check=True
    ).stdout
    assert PUBLISHED.read_text(encoding="utf-8") == printed, (
        "the records have changed: python -m vlm_unlearn.reporting.schema > docs/summary.schema.json"
    )
    assert json.loads(printed) == summary_schema()


def test_schema_describes_each_field() -> None:
    schema = summary_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"] == "urn:vlm-unlearn:summary:1"
    assert schema["properties"]["schema"]["const"] == 1
    assert schema["required"] == ["rows"]
    for record in (schema, *schema["$defs"].values()):
        assert record["description"]
        assert all(field.get("description") for field in record["properties"].values()), record["title"]


def test_summary_written_reads_back_unchanged(written: list[dict[str, object]]) -> None:
    for document in written:
        summary = Summary.model_validate(document)
        assert Summary.model_validate(summary.model_dump()) == summary
        assert document.items() <= summary.model_dump().items() or document is OLD
    assert written[0]["rows"][0]["paper"]["refusal_rate"]["n"] == 40
    assert written[1]["comparisons"]
    old = Summary.model_validate(OLD).rows[0]
    assert (old.judge, old.labels, old.rewrites, old.batching) == ("", {}, {}, None)


def test_jsonschema_accepts_what_is_written_and_rejects_invalid_files(written: list[dict[str, object]]) -> None:
    validator = pytest.importorskip("jsonschema", reason="needs jsonschema (the dev extra)").Draft202012Validator
    validator.check_schema(summary_schema())
    published = validator(json.loads(PUBLISHED.read_text(encoding="utf-8")))
    for document in written:
        published.validate(document)
    for broken in (
        {"schema": 2, "rows": []},
        {"rows": [{"model": "m"}]},
        {"rows": [{"model": "m", "metrics": {"asr": {"value": "0.5", "low": None, "high": None, "n": 1}}}]},
        {"rows": [], "row": []},
    ):
        assert list(published.iter_errors(broken)), broken


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"metrics": {"asr": {"value": "nan", "low": 0, "high": 1, "n": 9}}}, "metrics.asr.value"),
        ({"metrics": {"asr": {"value": 0.5, "low": "-inf", "high": 1, "n": 9}}}, "metrics.asr.low"),
        ({"metrics": {"asr": {"value": 0.5, "low": 0, "high": 70, "n": 9}}}, "metrics.asr.high"),
        ({"metrics": {"asr": {"value": 0.5, "low": 0, "high": 1, "n": -9}}}, "metrics.asr.n"),
        ({"metrics": {"asr": {"value": 0.5, "low": 0, "high": 1, "n": 9, "failed": -1}}}, "metrics.asr.failed"),
        ({"metrics": {}, "labels": {"safe": {"refused": -1}}}, "labels.safe.refused"),
        ({"metrics": {}, "batching": {"checked": 1, "flipped": 2}}, "batching"),
    ],
)
def test_read_summary_impossible_number_names_the_field(row: dict[str, object], field: str, tmp_path: Path) -> None:
    text = json.dumps({"rows": [{"model": "m", **row}]}).replace('"nan"', "NaN").replace('"-inf"', "-Infinity")
    (tmp_path / "summary.json").write_text(text)
    with raises_code("invalid-field", file=tmp_path / "summary.json") as caught:
        read_summary(tmp_path)
    assert f"rows.0.{field}: " in str(caught.value)
