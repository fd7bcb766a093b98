"""The sentences, charts and tables about attacks state what the results show, the worst case first."""

from __future__ import annotations

import csv
import io
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from robustness_results import HIDES, MEETS, REMOVES, Rates, report, result, share
from vlm_unlearn.records import Rate
from vlm_unlearn.reporting.charts.chart import Heatmap, Lines, hover_texts
from vlm_unlearn.reporting.charts.inline_svg import inline_svg
from vlm_unlearn.reporting.charts.matplotlib_charts import delete_stale_plots, write_plots
from vlm_unlearn.reporting.charts.robustness_charts import MAX_INTERVALS, attack_map, curve_charts
from vlm_unlearn.reporting.robustness.ranking import AttackedModel, rank_attacks, rank_models
from vlm_unlearn.reporting.robustness.text import explain, limits, tried_attacks, verdict
from vlm_unlearn.reporting.tables import TABLE_NAMES
from vlm_unlearn.reporting.tables.csv_text import csv_text
from vlm_unlearn.reporting.tables.latex import latex
from vlm_unlearn.reporting.tables.markdown import markdown
from vlm_unlearn.reporting.tables.robustness_tables import robustness_tables
from vlm_unlearn.robustness.results import AttackResult, RobustnessReport

HOSTILE = "<b>npo</b>$\u202e$"
NOTHING = Rate(value=None, low=None, high=None, n=0, failed=40)


def model(results: Rates | list[AttackResult] = HIDES, name: str = "npo", **fields: str | None) -> AttackedModel:
    (ranked,) = rank_models({name: report(results, **fields)})
    return ranked


def ranked(**reports: RobustnessReport) -> list[AttackedModel]:
    return rank_models(reports)


def test_the_worst_case_comes_first() -> None:
    models = ranked(
        removes=report(REMOVES),
        meets=report(MEETS),
        hides=report(HIDES),
        empty=report([]),
        none=report({"none": (0, 1, 0)}),
    )
    assert [each.name for each in models[:2]] == ["hides", "removes"]
    names = [each.name for each in models[0].ranked]
    assert names[0] == "relearn/10/5"
    assert names[-2:] == ["relearn/10/5/first_half", "relearn/10/20/first_half"]  # they teach the answers
    attacks = rank_attacks(models)
    assert (attacks[0], attacks[-1]) == ("relearn/10/5", "none")
    assert len(attacks) == len(set(attacks)) == len({*HIDES, *MEETS})
    assert models[0].worst is not None
    assert models[0].worst.name == "relearn/10/5"
    assert [each.worst for each in models if each.name == "empty"] == [None]


@pytest.mark.parametrize(
    ("results", "never_knew", "expected"),
    [
        (HIDES, "never", "back"),
        (HIDES, None, "harmful_under_attack"),
        (REMOVES, "never", "not_distinguishable"),
        (REMOVES, None, "no_control"),
        (MEETS, "never", "unclear"),
        ({}, "never", "unclear"),
        ({**REMOVES, "relearn/10/5/first_half": (1.0, 1.0, 0.0)}, "never", "relearns_faster"),
        ({**REMOVES, "none": (0.2, 1.0, 0.0)}, "never", "distinguishable"),
        ({**REMOVES, "probe/likelihood": (0.8, 0.9, 0.1)}, "never", "distinguishable"),
        ({**REMOVES, "pgd/16": (0.0, 1.0, 0.6)}, "never", "distinguishable"),  # less than never having known
    ],
)
def test_verdict_follows_from_the_intervals(results: Rates, never_knew: str | None, expected: str) -> None:
    if never_knew is None:  # pgd gets harm out of the control as well, which counts against a model without a control
        results = {name: (0.0, *rates[1:]) if results is REMOVES else rates for name, rates in results.items()}
    attacked = model(results, never_knew=never_knew)
    assert verdict(attacked) == expected
    assert all(sentence.endswith(".") for sentence in explain(attacked))


def test_unread_verdicts_are_no_sign_of_forgetting() -> None:
    results = [result("prefill/4", share(0.0)), result("quantize/int4", share(0.0, 20, failed=20))]
    assert verdict(model(results)) == "unclear"
    assert any("20" in sentence for sentence in explain(model(results)))
    assert verdict(model([result("prefill/4", NOTHING)])) == "unclear"


def test_limits_name_missing_controls_judges_and_attacks() -> None:
    models = [model(HIDES, "a"), model(MEETS, "b", never_knew=None, judge="keyword")]
    lines = limits(models, 3)
    assert any("b" in line and "--never-knew" in line for line in lines)
    assert any("keyword" in line for line in lines)
    assert not any("--never-knew" in line for line in limits(models[:1], 1))
    tried, missing = tried_attacks(models, 3).split(" Not tried: ")
    assert "further training," not in missing
    assert "quantization (not on all models)" in tried
    assert "2 of 3 models" in tried
    assert "in-context examples" in missing
    assert "one-word rewrites" in missing
    assert "one-word rewrites" not in tried_attacks(models, 3, ["one_word"]).split(" Not tried: ")[1]
    assert "quantization" not in missing


def test_attacks_that_supply_the_answers_come_last_and_decide_nothing() -> None:
    results = {"none": (0.0, 1.0, 0.0), "pgd/16": (0.0, 1.0, 0.0), "pgd/reference/8": (1.0, 1.0, 0.0)}
    results |= {"restore/mix/0.5": (1.0, 1.0, 0.0), "probe/likelihood": (0.9, 0.9, 0.1)}
    without = model(results, never_knew=None)
    assert [each.name for each in without.ranked] == [
        "pgd/16",
        "probe/likelihood",
        "pgd/reference/8",
        "restore/mix/0.5",
    ]
    assert verdict(without) == "no_control"
    # With a control, the parts of the base that bring knowledge back prove that the rest was in the model.
    compared = model(results)
    assert compared.worst is not None
    assert compared.worst.name == "restore/mix/0.5"
    assert verdict(compared) == "back"
    assert any("supply the answers" in line for line in limits([compared], 1))


def test_curves_have_an_axis_of_their_own() -> None:
    results = [
        result(f"probe/linear/{layer}", 0.5).model_copy(update={"curve": "probe/linear", "step": float(layer)})
        for layer in range(3)
    ]
    curve = curve_charts([model(results)])["curve-1"]
    assert isinstance(curve, Lines)
    assert (curve.title, curve.x, curve.y) == ("probe/linear", "layer", "mean score")


def cells(chart: Heatmap) -> dict[tuple[str, str], str]:
    return {
        (attack, name): text
        for attack, texts in zip(chart.rows, chart.texts, strict=True)
        for name, text in zip(chart.columns, texts, strict=True)
    }


def test_heat_map_shows_intervals_and_marks_undefined_cells(tmp_path: Path) -> None:
    models = ranked(hides=report(HIDES), meets=report(MEETS))
    (chart,) = attack_map(models).values()
    assert isinstance(chart, Heatmap)
    texts = cells(chart)
    assert texts["relearn/10/5", "hides"].startswith("68\n[")
    assert texts["relearn/all/60", "meets"] == "(100)"  # base and control meet
    assert texts["relearn/10/5", "meets"] == ""  # not tried
    hovers = hover_texts(chart)
    assert len(hovers) == len(chart.rows) * len(chart.columns)
    assert any("relearn/10/5, meets: not tried" in text for text in hovers)
    assert any("undefined" in text and "never knew 100.0" in text for text in hovers)
    (svg,) = [file for file in write_plots(tmp_path, {"attack-map": chart}) if file.suffix == ".svg"]
    root = ElementTree.fromstring(str(inline_svg(svg.read_text("utf-8"), "attack-map", chart)))
    titles = [node.text for node in root.iter("title")]
    assert titles == hovers
    description = root.find("desc")
    assert description is not None
    assert description.text == chart.description
    hatched = [node for node in root.iter("path") if "url(#attack-map-" in node.get("style", "")]
    assert len(hatched) == sum(text.startswith("(") for text in texts.values())
    delete_stale_plots(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


def test_heat_map_of_many_models_and_attacks_stays_readable(tmp_path: Path) -> None:
    names = [f"{HOSTILE} {'x' * 200} {number}" for number in range(40)]
    many = {f"prefill/{number}": (number / 100, 1.0, 0.0) for number in range(90)}
    (chart,) = attack_map(rank_models({name: report(many) for name in names})).values()
    assert isinstance(chart, Heatmap)
    assert (len(chart.rows), len(chart.columns)) == (60, 30)
    assert chart.rows[0] == "prefill/89"
    assert "30 more attacks and 10 more models" in chart.title
    assert not any("\n" in text for texts in chart.texts for text in texts)
    few = rank_models({name: report(many) for name in names[:MAX_INTERVALS]})
    (chart,) = attack_map(few).values()
    assert isinstance(chart, Heatmap)
    assert all("\n" in text for texts in chart.texts for text in texts)
    files = write_plots(tmp_path, {"attack-map": Heatmap("t", ["$x$"], [HOSTILE], [[250.0]], [["250\n[-9, 500]"]])})
    assert all(file.stat().st_size for file in files)
    assert attack_map([]) == {}


def test_relearning_curves_have_the_base_and_the_never_knew_line() -> None:
    charts = curve_charts(ranked(hides=report(HIDES), removes=report(REMOVES), meets=report(MEETS)))
    assert [chart.title for chart in charts.values()] == ["relearn/10", "relearn/10/first_half"]
    curve = charts["curve-1"]
    assert isinstance(curve, Lines)
    assert [(line.name, line.is_reference) for line in curve.series] == [
        ("hides", False),
        ("removes", False),
        ("base", True),
        ("never knew", True),
    ]
    assert list(curve.series[0].x) == [5.0, 20.0]
    assert list(curve.series[0].values) == [65.0, 50.0]
    assert all(line.error_bars for line in curve.series)


def test_relearning_curves_of_other_bases_are_named_and_a_missing_control_has_no_line() -> None:
    other = {name: (asr, base / 2, never) for name, (asr, base, never) in HIDES.items()}
    models = rank_models({"a": report(HIDES, never_knew=None), "b": report(other, never_knew=None)})
    curve = curve_charts(models)["curve-1"]
    assert isinstance(curve, Lines)
    assert [line.name for line in curve.series if line.is_reference] == ["base", "base, of a"]
    many = rank_models({f"m{number}": report(HIDES) for number in range(12)})
    curve = curve_charts(many)["curve-1"]
    assert isinstance(curve, Lines)
    assert len(curve.series) == 8 + 2
    assert "4 more models" in curve.title


def test_tables_have_every_attack_the_worst_ones_and_the_steps() -> None:
    models = rank_models({HOSTILE: report(HIDES), "=1+1": report(REMOVES), "none tried": report([])})
    tables = {table.name: table for table in robustness_tables(models)}
    assert set(tables) < set(TABLE_NAMES)
    assert len(tables["worst_attacks"].lines) == 2
    assert len(tables["robustness"].lines) == 2 * len(HIDES)
    assert len(tables["steps_to_half"].lines) == 4
    rows = list(csv.DictReader(io.StringIO(csv_text(tables["robustness"]))))
    worst = rows[0]
    assert (worst["model"], worst["attack"]) == (HOSTILE, "relearn/10/5")
    assert float(worst["recovered"]) == pytest.approx(0.65 / 0.95)
    assert float(worst["recovered_low"]) < float(worst["recovered"]) < float(worst["recovered_high"])
    assert (float(worst["asr"]), float(worst["asr_base"]), float(worst["asr_never_knew"])) == (0.65, 0.95, 0.0)
    assert {row["model"] for row in rows} == {HOSTILE, "'=1+1"}
    assert [row["recovered"] for row in rows if row["attack"] == "relearn/10/20/first_half"] == ["", ""]
    for table in tables.values():
        assert "<b>" not in markdown(table)
        assert "U+202E" in latex(table)
        for form in (markdown(table), latex(table), csv_text(table)):
            assert "relearn/10" in form
    steps = list(csv.DictReader(io.StringIO(csv_text(tables["steps_to_half"]))))
    assert [row["steps"] for row in steps if row["curve"] == "relearn/10"] == ["5.0", ""]
    assert robustness_tables([]) == []
    assert robustness_tables(rank_models({"a": report([])})) == []


def test_tables_without_a_control_say_so() -> None:
    tables = {table.name: table for table in robustness_tables([model(HIDES, never_knew=None)])}
    assert "anew" in tables["worst_attacks"].caption(True)
    assert "never_knew" not in csv_text(tables["steps_to_half"])
    assert "anew" not in robustness_tables([model(HIDES)])[0].caption(True)
