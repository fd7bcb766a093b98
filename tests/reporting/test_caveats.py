"""What a report says its numbers can't tell is true of that report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vlm_unlearn.config import Suite, load, validate
from vlm_unlearn.metrics.rates import rate
from vlm_unlearn.records import Rate, Row
from vlm_unlearn.reporting.caveats import caveats
from vlm_unlearn.reporting.columns import METRIC_COLUMNS
from vlm_unlearn.reporting.metric_roles import assign_roles
from vlm_unlearn.reporting.provenance import ModelProvenance

NOTHING = Rate(value=None, low=None, high=None, n=0)


def share(hits: int, n: int) -> Rate:
    return rate([i < hits for i in range(n)], [str(i) for i in range(n)])


def told(suite: Suite, metrics: Mapping[str, Rate], judge: str = "four_labels@j", **fields: object) -> str:
    rows = [Row.model_validate({"model": "m", "judge": judge, "metrics": metrics, **fields})]
    return "\n".join(
        caveats(rows, assign_roles(rows, {"m": suite}), {"m": ModelProvenance("m", Path(), suite, {}, 10)}, [])
    )


MIRAGE = load(Suite, "suites/safety_mirage", ["model=m", "root=.", "judge.model=j"])


def test_what_was_asked_and_what_is_known_are_two_things() -> None:
    benchmarks = load(Suite, "suites/specificity", ["model=m", "root=.", "judges.mm_vet.model=j"])
    assert "No unsafe question was asked" in told(benchmarks, {"gqa": share(5, 10)})
    lost = told(MIRAGE, {"asr": NOTHING, "utility": share(5, 10)})
    assert "No unsafe question was asked" not in lost
    assert "No rate tells how many unsafe questions were answered with the harm" in lost


def test_an_attack_is_known_by_its_case() -> None:
    assert "No attack was tried" in told(MIRAGE, {"asr": share(0, 10)})
    assert "Only the attacks shown were tried" in told(MIRAGE, {"asr": share(0, 10), "asr_attacked": share(0, 10)})
    case = {"format": "vlguard", "file": "f.json", "images": ".", "kind": "unsafe"}
    cases = [case | {"name": "plain"}, case | {"name": "jailbroken", "rewrite": {"trigger": "what", "num_rewrites": 3}}]
    metrics = {
        "asr": {"splits": ["plain"], "labels": ["complied"]},
        "asr_jailbreak": {"splits": ["jailbroken"], "labels": ["complied"]},
    }
    own = validate(Suite, {"model": "m", "root": ".", "splits": cases, "metrics": metrics}, "suite")
    found = told(own, {"asr": share(0, 200), "asr_jailbreak": share(19, 20)})
    assert "Only the attacks shown were tried" in found
    assert "asr jailbreak rests on 20 answers" in found  # the fewest, of whatever rate


def test_it_says_nothing_of_what_it_cannot_know() -> None:
    found = told(MIRAGE, {"asr": share(0, 200)})
    assert "this report doesn't show whether people agree with it" in found
    assert "nobody" not in found.split("people agree")[0]


def test_keywords_are_told_by_metric() -> None:
    assert "Keywords judged" in told(MIRAGE, {"asr": share(0, 200)}, judges={"asr": "keyword"})
    assert "Keywords judged" not in told(MIRAGE, {"asr": share(0, 200)})


def test_what_a_column_says_holds_for_every_suite() -> None:
    """Suites differ in the attack, its shots and the cases they count."""
    said = [explanation for _, _, explanation in METRIC_COLUMNS]
    assert not [
        one for one in said if any(word in one for word in ("What", "Share", "shot", "three", "all prompts", "paper"))
    ]
