"""Each caveat of a report is true of that report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vlm_unlearn.config import Suite, load, validate
from vlm_unlearn.metrics.rates import rate
from vlm_unlearn.records import Rate, Row
from vlm_unlearn.reporting.caveats import (
    AGREEMENT,
    KEYWORD_JUDGE,
    LISTED_ATTACKS,
    NO_ATTACK,
    NO_HARM_RATE,
    NO_UNSAFE_QUESTION,
    NOT_ATTACKED,
    NOT_ATTACKED_BUT_PREFILLED,
    SAMPLED,
    caveats,
)
from vlm_unlearn.reporting.columns import METRIC_COLUMNS
from vlm_unlearn.reporting.metric_roles import assign_roles
from vlm_unlearn.reporting.provenance import ModelProvenance

NOTHING = Rate(value=None, low=None, high=None, n=0)


def share(hits: int, n: int) -> Rate:
    return rate([i < hits for i in range(n)], [str(i) for i in range(n)])


def report_caveats(suite: Suite, metrics: Mapping[str, Rate], judge: str = "four_labels@j", **fields: object) -> str:
    rows = [Row.model_validate({"model": "m", "judge": judge, "metrics": metrics, **fields})]
    source = ModelProvenance("m", Path(), suite, {}, 10)
    return "\n".join(caveats(rows, assign_roles(rows, {"m": suite}), {"m": source}, []))


MIRAGE = load(Suite, "suites/safety_mirage", ["model=m", "root=.", "judge.model=j"])


def test_caveats_without_a_rate_of_harm_name_the_reason() -> None:
    benchmarks = load(Suite, "suites/specificity", ["model=m", "root=.", "judges.mm_vet.model=j"])
    assert NO_UNSAFE_QUESTION in report_caveats(benchmarks, {"gqa": share(5, 10)})
    lost = report_caveats(MIRAGE, {"asr": NOTHING, "utility": share(5, 10)})
    assert NO_UNSAFE_QUESTION not in lost
    assert NO_HARM_RATE in lost


def test_caveats_attack_is_recognized_by_its_split() -> None:
    assert NO_ATTACK in report_caveats(MIRAGE, {"asr": share(0, 10)})
    assert LISTED_ATTACKS in report_caveats(MIRAGE, {"asr": share(0, 10), "asr_attacked": share(0, 10)})
    split = {"format": "vlguard", "file": "f.json", "images": ".", "kind": "unsafe"}
    splits = [
        split | {"name": "plain"},
        split | {"name": "jailbroken", "rewrite": {"trigger": "what", "num_rewrites": 3}},
    ]
    metrics = {
        "asr": {"splits": ["plain"], "labels": ["complied"]},
        "asr_jailbreak": {"splits": ["jailbroken"], "labels": ["complied"]},
    }
    custom = validate(Suite, {"model": "m", "root": ".", "splits": splits, "metrics": metrics}, "suite")
    lines = report_caveats(custom, {"asr": share(0, 200), "asr_jailbreak": share(19, 20)})
    assert LISTED_ATTACKS in lines
    (smallest,) = [line for line in lines.splitlines() if line.startswith("asr jailbreak ")]  # the fewest of all rates
    assert "20 answers" in smallest


def test_caveats_depend_on_the_attacks_that_were_measured() -> None:
    attacked = load(Suite, "suites/tiny_attacks", ["model=m", "root=."])
    lines = report_caveats(attacked, {"asr": share(0, 200), "asr_prefill": share(0, 200)})
    assert (NOT_ATTACKED_BUT_PREFILLED in lines, NOT_ATTACKED in lines, SAMPLED in lines) == (True, False, True)
    plain = report_caveats(MIRAGE, {"asr": share(0, 200), "asr_attacked": share(0, 200)})
    assert (NOT_ATTACKED_BUT_PREFILLED in plain, NOT_ATTACKED in plain, SAMPLED in plain) == (False, True, False)


def test_caveats_agreement_with_people_is_not_measured_by_the_report() -> None:
    assert AGREEMENT in report_caveats(MIRAGE, {"asr": share(0, 200)})


def test_caveats_keyword_judge_is_found_by_metric() -> None:
    assert KEYWORD_JUDGE in report_caveats(MIRAGE, {"asr": share(0, 200)}, judges={"asr": "keyword"})
    assert KEYWORD_JUDGE not in report_caveats(MIRAGE, {"asr": share(0, 200)})


def test_column_explanations_hold_for_every_suite() -> None:
    """Suites differ in their attack, its rewrites and the splits that they count."""
    specific = ("What", "Share", "shot", "three", "all prompts", "paper")
    explanations = [explanation for _, _, explanation in METRIC_COLUMNS]
    assert [text for text in explanations if any(word in text for word in specific)] == []
