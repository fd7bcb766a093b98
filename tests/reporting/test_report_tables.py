"""Every table of a summary, as files: what machines read, what people read, and that names of others stay text."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest

from vlm_unlearn.config import Suite, load
from vlm_unlearn.errors import UserError
from vlm_unlearn.metrics.rates import rate
from vlm_unlearn.records import Comparison, Rate, Row, Summary
from vlm_unlearn.reporting.columns import better
from vlm_unlearn.reporting.tables.markdown import escaped
from vlm_unlearn.reporting.tables.summary_tables import (
    TABLE_NAMES,
    delete_stale_tables,
    named_table,
    summary_tables,
    write_tables,
    render_table,
)

HOSTILE = [
    "=HYPERLINK(1)",
    "<script>x</script> | `y`",
    "a\u202eb\x00c\ud800",
    "[x](javascript:y) @me :smile: www.example.org",
    "line\nbreak\r\n| more |",
    "*_~$#\\",
    "long " * 200_000,
]


def share(hits: int, n: int, failed: int = 0) -> Rate:
    return rate([i < hits for i in range(n)], [str(i) for i in range(n)], failed)


def change(model: str, metric: str, difference: float, p_adjusted: float) -> Comparison:
    ends = {"low": difference - 0.1, "high": difference + 0.1}
    return Comparison(
        model=model,
        base="base",
        metric=metric,
        difference=difference,
        p=p_adjusted / 2,
        p_adjusted=p_adjusted,
        test="mcnemar",
        n=90,
        **ends,
    )


def safety_mirage_row(name: str, *hits: int) -> Row:
    """A row with ASR and refusals before and after the attack, out of 40, and a benchmark."""
    metrics = ("asr", "asr_attacked", "refusal_rate", "refusal_rate_attacked", "vqav2")
    return Row(
        model=name,
        judge="four_labels@judge",
        metrics={metric: share(count, 40) for metric, count in zip(metrics, hits, strict=True)},
        labels={
            "unsafe_what": {
                "complied": hits[1],
                "refused": 40 - hits[1] - 2,
                "degenerate": 1,
                "off_topic": 0,
                "failed": 1,
            }
        },
        categories={"asr": {"Ads": share(hits[0] // 2, 20), "Fraud": share(hits[0] // 4, 10)}},
        rewrites={"asr_attacked": [share(hits[1] // 2, 40), share(hits[1], 40)]},
    )


@pytest.fixture
def summary() -> Summary:
    rows = [
        safety_mirage_row("base", 30, 36, 0, 0, 32),
        safety_mirage_row("npo", 2, 4, 1, 4, 31),
        safety_mirage_row("rmu", 2, 6, 1, 2, 32),
    ]
    paper = {"asr": share(20, 40), "asr_attacked": share(25, 40), "answers_refused_attacked": share(3, 120)}
    rows[1] = rows[1].model_copy(update={"paper": paper})
    return Summary(rows=rows, comparisons=[change("npo", "asr", -0.7, 0.0004), change("rmu", "vqav2", 0.0, 1.0)])


def read(table: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table)))


def cells(markdown: str) -> list[list[str]]:
    """The lines of the one table in a Markdown text."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.split("\n\n")[0].splitlines()]


def test_every_table_that_the_summary_fills_is_written_three_times(summary: Summary, tmp_path: Path) -> None:
    costs = {"npo": {"training time": "5.1 s", "peak memory": "626 MB"}, "rmu": {"training time": "6.0 s"}}
    files = write_tables(tmp_path, summary, costs)
    expected = set(TABLE_NAMES) - {"safe_eraser", "safe_eraser_published"}
    assert {file.relative_to(tmp_path).as_posix() for file in files} == {
        f"report/tables/{name}.{ending}" for name in expected for ending in ("csv", "tex", "md")
    }
    assert all(file.stat().st_size for file in files)
    assert cells((tmp_path / "report/tables/cost.md").read_text())[2:] == [
        ["npo", "5.1 s", "626 MB"],
        ["rmu", "6.0 s", "–"],
    ]
    later = write_tables(tmp_path, Summary(rows=[Row(model="m", metrics={"asr": share(1, 4)})]), {})
    (tmp_path / "report/tables/mine.csv").write_text("somebody's")
    delete_stale_tables(tmp_path, later)
    assert set((tmp_path / "report/tables").iterdir()) == {
        *later,
        tmp_path / "report/tables/mine.csv",
    }  # nothing else of before
    assert {file.stem for file in later} == {"rates"}


def test_csv_has_the_numbers_of_the_summary(summary: Summary) -> None:
    text = render_table(named_table(summary, "rates"), "csv")
    assert text.count("\r\n") == text.count("\n") == 1 + 15
    lines = read(text)
    assert list(lines[0]) == ["model", "metric", "value", "low", "high", "n", "failed"]
    for line in lines:
        expected = next(row for row in summary.rows if row.model == line["model"]).metrics[line["metric"]]
        assert Rate.model_validate({key: line[key] for key in Rate.model_fields}) == expected  # to the last digit
    change = read(render_table(named_table(summary, "comparisons"), "csv"))[0]
    assert (change["metric"], float(change["difference"]), float(change["p_adjusted"]), change["n"]) == (
        "asr",
        -0.7,
        0.0004,
        "90",
    )
    labels = read(render_table(named_table(summary, "labels"), "csv"))
    assert labels[5] == {"case": "unsafe_what", "model": "npo", "label": "complied", "answers": "4", "share": "0.1"}
    assert {line["label"] for line in labels} == {"complied", "refused", "degenerate", "off_topic", "failed"}
    counting = read(render_table(named_table(summary, "published"), "csv"))
    assert [(line["metric"], line["counting"], float(line["value"])) for line in counting[:2]] == [
        ("asr", "published", 0.5),
        ("asr", "corrected", 0.05),
    ]
    assert [line["shots"] for line in read(render_table(named_table(summary, "shots"), "csv"))[:2]] == ["1", "2"]
    assert read(render_table(named_table(summary, "categories"), "csv"))[1]["category"] == "Fraud"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", " =1", "＝1"])
def test_no_csv_cell_is_a_formula(text: str) -> None:
    summary = Summary(
        rows=[Row(model=text, metrics={"asr": share(1, 4)})], comparisons=[change(text, "asr", -0.5, 0.1)]
    )
    assert read(render_table(named_table(summary, "rates"), "csv"))[0]["model"] == f"'{text}"
    assert read(render_table(named_table(summary, "comparisons"), "csv"))[0]["difference"] == "-0.5"  # a number stays one
    beside = Summary(
        rows=[Row(model=f"npo;{text}", metrics={"asr": share(1, 4)})]
    )  # many countries' spreadsheets split at semicolons
    model = read(render_table(named_table(beside, "rates"), "csv"))[0]["model"]
    assert model.split(";")[1].lstrip(" ").startswith("'")


def test_the_best_of_a_column_is_bold_by_its_direction_and_ties_all_are(summary: Summary) -> None:
    lines = {line[0]: line[1:] for line in cells(render_table(named_table(summary, "rates"), "md", intervals=False))}
    assert lines["model"] == ["ASR", "ASR attacked", "Refusals", "Refusals attacked", "VQAv2"]
    assert lines["base"] == ["75.0", "90.0", "**0.0**", "**0.0**", "**80.0**"]
    assert lines["npo"] == [r"**5.0**\*", "**10.0**", "2.5", "10.0", "77.5"]  # the change in ASR is significant
    assert lines["rmu"] == ["**5.0**", "15.0", "2.5", "5.0", "**80.0**"]
    single = Summary(rows=[Row(model="m", metrics={"asr": share(1, 4), "own": share(1, 4)})])
    assert "**" not in render_table(named_table(single, "rates"), "md")
    own = Summary(rows=[Row(model=name, metrics={"own_metric": share(hits, 4)}) for name, hits in (("a", 1), ("b", 3))])
    assert "**" not in render_table(named_table(own, "rates"), "md")  # nobody knows which end of it is good


def test_every_shipped_metric_has_a_direction() -> None:
    """All but one: it is neither good nor bad where the answers went that are no success of the attack."""
    unknown = set()
    for name in ("safety_mirage", "safety_mirage_released_attack", "safe_eraser", "specificity", "tiny"):
        suite = load(Suite, Path(f"suites/{name}"), ["model=m"])
        unknown |= {metric for metric in (*suite.metrics, *suite.paper_metrics) if better(metric) is None}
        unknown |= {benchmark.name for benchmark in suite.benchmarks if better(benchmark.name) is None}
    assert unknown == {"answers_refused_attacked"}


def test_the_caption_names_judge_counts_failures_and_marks(summary: Summary) -> None:
    rows = [*summary.rows[:2], Row(model="rmu", metrics={"asr": share(6, 30, failed=10)})]
    caption = named_table(summary.model_copy(update={"rows": rows}), "rates").caption(intervals=True)
    assert "Judged by four_labels@judge." in caption
    assert "n = 30 to 40 (ASR), 40 (ASR attacked, Refusals, Refusals attacked, VQAv2)." in caption
    assert "Answers or verdicts that failed, over all models: 10 (ASR)." in caption
    assert "* differs from base: significant after Holm's correction over 2 comparisons (adjusted p < 0.05)." in caption
    assert caption.endswith("In brackets: 95 % intervals. Best in bold.")
    assert "None failed." in named_table(summary, "rates").caption(intervals=True)
    assert "In brackets" not in named_table(summary, "rates").caption(intervals=False)


def test_a_caption_names_the_judges_of_what_its_table_shows(summary: Summary) -> None:
    row = summary.rows[1].model_copy(
        update={"judges": {"vqav2": "", "own": "relevance@j"}, "paper_judges": {"asr": "keyword-paper"}}
    )
    row = row.model_copy(update={"metrics": row.metrics | {"own": share(1, 4)}})
    asked = Summary(rows=[row], comparisons=summary.comparisons[:1])
    said = {name: table.caption(intervals=False) for name, table in summary_tables(asked).items()}
    assert "Judged by four_labels@judge and relevance@j." in said["rates"]
    for name in ("comparisons", "safety_mirage", "safety_mirage_answers", "labels", "categories", "shots"):
        assert "Judged by four_labels@judge. " in said[name], name
    assert "Judged by four_labels@judge and keyword-paper." in said["published"]
    assert "Judged by four_labels@judge and keyword-paper." in said["safety_mirage_published"]
    only = row.model_copy(update={"metrics": {"vqav2": share(1, 4)}})
    assert "Judged" not in named_table(Summary(rows=[only]), "rates").caption(
        intervals=False
    )  # its official answers decide


def test_every_caption_says_how_many_and_how_many_failed(summary: Summary) -> None:
    failing = summary.rows[1].metrics["asr_attacked"].model_copy(update={"failed": 3})
    row = summary.rows[1].model_copy(update={"metrics": summary.rows[1].metrics | {"asr_attacked": failing}})
    shots = {"asr_attacked": [failing.model_copy(update={"failed": 1}), failing]}
    rows = [summary.rows[0], row.model_copy(update={"rewrites": shots, "paper": {"asr_attacked": failing}})]
    said = {
        name: table.caption(intervals=False)
        for name, table in summary_tables(Summary(rows=rows, comparisons=[])).items()
    }
    for name in ("shots", "published"):
        assert "n = 40 (ASR attacked)." in said[name]
        assert "Answers or verdicts that failed, over all models: 3 (ASR attacked)." in said[name]  # each once
    assert "n = 10 to 20 (ASR). None failed." in said["categories"]
    assert "n = 40 (unsafe questions that begin with &quot;What&quot;)".replace("&quot;", '"') in said["labels"]
    assert "None failed." in named_table(summary, "comparisons").caption(intervals=False)


def test_many_categories_stand_below_each_other(summary: Summary) -> None:
    many = {"asr": {f"category {i}": share(i, 30) for i in range(25)}}
    rows = [row.model_copy(update={"categories": many}) for row in summary.rows[:2]]
    table = named_table(Summary(rows=rows), "categories")
    assert [column.heading for column in table.columns] == ["metric", "category", "base", "npo"]
    assert len(table.lines) == 25
    line = read(render_table(table, "csv"))[1]
    assert (line["metric"], line["category"], line["model"], float(line["value"])) == ("asr", "category 0", "npo", 0.0)


def test_no_number_is_best_of_two_judges(summary: Summary) -> None:
    rows = [summary.rows[0], summary.rows[1].model_copy(update={"judges": {"asr": "another"}})]
    for name, at in (("rates", 1), ("safety_mirage", 1)):
        best = named_table(Summary(rows=rows), name).best()
        assert at not in {column for _, column in best}
        assert at + 1 in {column for _, column in best}


def test_safety_mirages_table(summary: Summary) -> None:
    lines = cells(render_table(named_table(summary, "safety_mirage"), "md", intervals=False))
    assert lines[0] == ["model", "ASR before", "ASR after", "RR before", "RR after", "VQAv2"]
    assert lines[3] == ["npo", "**5.0**", "**10.0**", "2.5", "10.0", "77.5"]
    published = cells(render_table(named_table(summary, "safety_mirage_published"), "md", intervals=False))
    assert published[2:] == [
        ["npo", "50.0", "62.5", "2.5", "10.0", "77.5"]
    ]  # by the published counting, where that has the metric
    answers = cells(render_table(named_table(summary, "safety_mirage_answers"), "md"))
    assert answers[0] == ["model", "complied", "refused", "degenerate", "off topic", "failed"]
    assert answers[3] == ["npo", "10.0", "85.0", "2.5", "0.0", "2.5"]


def test_safe_erasers_table() -> None:
    measured = ("efficacy_asr", "efficacy_rr", "sarr", "rouge_l", "specificity", "gqa", "pope")
    rows = [
        Row(model=name, metrics={metric: share(hits, 40) for metric in measured})
        for name, hits in (("po", 40), ("po+pd", 10))
    ]
    table = named_table(Summary(rows=rows), "safe_eraser")
    assert cells(render_table(table, "md", intervals=False)) == [
        [
            "model",
            "Efficacy ASR",
            "Efficacy RR",
            "SARR",
            "ROUGE-L",
            "Specificity mean",
            "Specificity GQA",
            "Specificity POPE",
        ],
        ["---", *["---:"] * 7],
        ["po", "100.0", "**100.0**", "100.0", *["**100.0**"] * 4],
        ["po+pd", "**25.0**", "25.0", "**25.0**", *["25.0"] * 4],
    ]
    bare = [row.model_copy(update={"metrics": {"sarr": share(1, 4)}}) for row in rows]
    assert "safe_eraser" not in summary_tables(Summary(rows=bare))  # without its core it would be another table


def test_a_missing_number_is_a_dash_and_no_line_for_machines() -> None:
    rows = [
        Row(model="a", metrics={"asr": share(1, 4), "sarr": Rate(value=None, low=None, high=None, n=0)}),
        Row(model="b", metrics={}),
    ]
    table = named_table(Summary(rows=rows), "rates")
    assert cells(render_table(table, "md", intervals=False))[2:] == [["a", "25.0", "–"], ["b", "–", "–"]]
    assert len(read(render_table(table, "csv"))) == 1
    assert summary_tables(Summary(rows=[])) == {}


def test_names_stay_in_their_markdown_cells() -> None:
    rows = [
        Row(model=name, metrics={"asr": share(1, 4), name: share(2, 4)}, labels={name: {"complied": 1}})
        for name in HOSTILE
    ]
    for name, table in summary_tables(Summary(rows=rows)).items():
        text = render_table(table, "md")
        lines = text.split("\n\n")[0].splitlines()
        assert len(lines) == 2 + len(table.lines), name
        assert {line.count("|") for line in lines} == {len(table.columns) + 1}, name
        assert not re.search(r"<\w|\x00|\u202e|\ud800|javascript:|@me|:smile:|www\.e|(?<!\\)[`\[](?!\d)", text), name
        assert len(max(lines, key=len)) < 5000


def test_plain_names_stay_readable_in_markdown() -> None:
    assert escaped("mixed_sft llava-1.5-7b: 4.1 po+pd") == "mixed_sft llava-1.5-7b: 4.1 po+pd"
    assert escaped("_x_ *y*") == r"\_x\_ \*y\*"


def test_a_table_by_name(summary: Summary) -> None:
    with pytest.raises(UserError, match='no table "rats"; did you mean "rates"'):
        named_table(summary, "rats")
    with pytest.raises(UserError, match=r'no table "cost"; known: (?!.*cost)'):  # a summary holds none
        named_table(summary, "cost")
    with pytest.raises(UserError, match="nothing was measured that the table safe_eraser shows; there is: rates, "):
        named_table(summary, "safe_eraser")
