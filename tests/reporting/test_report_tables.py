"""Tables of a summary: content, CSV and Markdown, captions, and names from data files that must stay text."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest

from helpers import raises_code
from vlm_unlearn.config import Suite, load
from vlm_unlearn.metrics.rates import rate
from vlm_unlearn.records import Comparison, Rate, Row, Summary
from vlm_unlearn.reporting.columns import better, split_title
from vlm_unlearn.reporting.tables.markdown import escaped
from vlm_unlearn.reporting.tables.summary_tables import (
    TABLE_NAMES,
    delete_stale_tables,
    named_table,
    render_table,
    summary_tables,
    write_tables,
)

FAILED = "Failed answers or verdicts, over all models: "
NONE_FAILED = "None failed."
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
    """A row with ASR and refusals before and after the attack and a benchmark, each as a count out of 40."""
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


def parse_csv(table: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table)))


def cells(markdown: str) -> list[list[str]]:
    """The cells of each line of the table in a Markdown text."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.split("\n\n")[0].splitlines()]


def test_write_tables_writes_three_files_per_table(summary: Summary, tmp_path: Path) -> None:
    costs = {"npo": {"training time": "5.1 s", "peak memory": "626 MB"}, "rmu": {"training time": "6.0 s"}}
    files = write_tables(tmp_path, summary, costs)
    expected = set(TABLE_NAMES) - {"safe_eraser", "safe_eraser_published"}
    expected -= {"worst_attacks", "robustness", "steps_to_half"}  # of attacks on the models
    assert {file.relative_to(tmp_path).as_posix() for file in files} == {
        f"report/tables/{name}.{ending}" for name in expected for ending in ("csv", "tex", "md")
    }
    assert all(file.stat().st_size for file in files)
    assert cells((tmp_path / "report/tables/cost.md").read_text())[2:] == [
        ["npo", "5.1 s", "626 MB"],
        ["rmu", "6.0 s", "–"],
    ]


def test_delete_stale_tables_keeps_current_tables_and_user_files(summary: Summary, tmp_path: Path) -> None:
    write_tables(tmp_path, summary, {})
    folder = tmp_path / "report/tables"
    (folder / "shots.csv").write_text("of an earlier version")
    (folder / "mine.csv").write_text("of the user")
    current = write_tables(tmp_path, Summary(rows=[Row(model="m", metrics={"asr": share(1, 4)})]), {})
    delete_stale_tables(tmp_path, current)
    assert {file.stem for file in current} == {"rates"}
    assert set(folder.iterdir()) == {*current, folder / "mine.csv"}


def test_csv_contains_the_numbers_of_the_summary(summary: Summary) -> None:
    text = render_table(named_table(summary, "rates"), "csv")
    assert text.count("\r\n") == text.count("\n") == 1 + 15
    lines = parse_csv(text)
    assert list(lines[0]) == ["model", "metric", "value", "low", "high", "n", "failed"]
    for line in lines:
        expected = next(row for row in summary.rows if row.model == line["model"]).metrics[line["metric"]]
        assert Rate.model_validate({key: line[key] for key in Rate.model_fields}) == expected  # to the last digit
    change = parse_csv(render_table(named_table(summary, "comparisons"), "csv"))[0]
    assert (change["metric"], float(change["difference"]), float(change["p_adjusted"]), change["n"]) == (
        "asr",
        -0.7,
        0.0004,
        "90",
    )
    labels = parse_csv(render_table(named_table(summary, "labels"), "csv"))
    assert labels[5] == {"case": "unsafe_what", "model": "npo", "label": "complied", "answers": "4", "share": "0.1"}
    assert {line["label"] for line in labels} == {"complied", "refused", "degenerate", "off_topic", "failed"}
    counting = parse_csv(render_table(named_table(summary, "published"), "csv"))
    assert [(line["metric"], line["counting"], float(line["value"])) for line in counting[:2]] == [
        ("asr", "published", 0.5),
        ("asr", "corrected", 0.05),
    ]
    assert [line["shots"] for line in parse_csv(render_table(named_table(summary, "rewrites"), "csv"))[:2]] == [
        "1",
        "2",
    ]
    assert parse_csv(render_table(named_table(summary, "categories"), "csv"))[1]["category"] == "Fraud"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", " =1", "＝1"])
def test_csv_escapes_formulas(text: str) -> None:
    summary = Summary(
        rows=[Row(model=text, metrics={"asr": share(1, 4)})], comparisons=[change(text, "asr", -0.5, 0.1)]
    )
    assert parse_csv(render_table(named_table(summary, "rates"), "csv"))[0]["model"] == f"'{text}"
    assert (
        parse_csv(render_table(named_table(summary, "comparisons"), "csv"))[0]["difference"] == "-0.5"
    )  # numbers are not escaped
    # Spreadsheets with some locales split at semicolons.
    with_semicolon = Summary(rows=[Row(model=f"npo;{text}", metrics={"asr": share(1, 4)})])
    model = parse_csv(render_table(named_table(with_semicolon, "rates"), "csv"))[0]["model"]
    assert model.split(";")[1].lstrip(" ").startswith("'")


def test_best_numbers_are_bold_including_ties(summary: Summary) -> None:
    lines = {line[0]: line[1:] for line in cells(render_table(named_table(summary, "rates"), "md", intervals=False))}
    assert lines["model"] == ["ASR", "ASR attacked", "Refusals", "Refusals attacked", "VQAv2"]
    assert lines["base"] == ["75.0", "90.0", "**0.0**", "**0.0**", "**80.0**"]
    assert lines["npo"] == [r"**5.0**\*", "**10.0**", "2.5", "10.0", "77.5"]  # the change in ASR is significant
    assert lines["rmu"] == ["**5.0**", "15.0", "2.5", "5.0", "**80.0**"]
    single = Summary(rows=[Row(model="m", metrics={"asr": share(1, 4), "mine": share(1, 4)})])
    assert "**" not in render_table(named_table(single, "rates"), "md")
    rows = [Row(model=name, metrics={"my_metric": share(hits, 4)}) for name, hits in (("a", 1), ("b", 3))]
    assert "**" not in render_table(named_table(Summary(rows=rows), "rates"), "md")  # its better direction is unknown


def test_better_has_a_direction_for_every_shipped_metric() -> None:
    """Except how answers without harm look, such as `answers_refused_attacked`, which is neither good nor bad."""
    unknown = set()
    for name in ("safety_mirage", "safety_mirage_released_attack", "safe_eraser", "specificity", "tiny"):
        suite = load(Suite, Path(f"suites/{name}"), ["model=m"])
        unknown |= {metric for metric in (*suite.metrics, *suite.paper_metrics) if better(metric) is None}
        unknown |= {benchmark.name for benchmark in suite.benchmarks if better(benchmark.name) is None}
    assert unknown == {f"answers_{kind}{ending}" for kind in ("irrelevant", "refused") for ending in ("", "_attacked")}


def test_caption_contains_judge_counts_failures_and_marks(summary: Summary) -> None:
    rows = [*summary.rows[:2], Row(model="rmu", metrics={"asr": share(6, 30, failed=10)})]
    caption = named_table(summary.model_copy(update={"rows": rows}), "rates").caption(intervals=True)
    tokens = [
        "four_labels@judge",
        "n = 30 to 40 (ASR), 40 (ASR attacked, Refusals, Refusals attacked, VQAv2)",
        f"{FAILED}10 (ASR)",
        "* differs from base",
        "over 2 comparisons",
        "p < 0.05",
        "95 % intervals",
        "bold",
    ]
    assert [token for token in tokens if token not in caption] == []
    assert NONE_FAILED in named_table(summary, "rates").caption(intervals=True)
    assert "95 % intervals" not in named_table(summary, "rates").caption(intervals=False)


def test_caption_contains_the_judges_of_the_table(summary: Summary) -> None:
    row = summary.rows[1].model_copy(
        update={"judges": {"vqav2": "", "mine": "relevance@j"}, "paper_judges": {"asr": "keyword-paper"}}
    )
    row = row.model_copy(update={"metrics": row.metrics | {"mine": share(1, 4)}})
    tables = summary_tables(Summary(rows=[row], comparisons=summary.comparisons[:1]))
    captions = {name: table.caption(intervals=False) for name, table in tables.items()}
    assert "four_labels@judge and relevance@j." in captions["rates"]
    for name in ("comparisons", "safety_mirage", "safety_mirage_answers", "labels", "categories", "rewrites"):
        assert "four_labels@judge. " in captions[name], name
    assert "four_labels@judge and keyword-paper." in captions["published"]
    assert "four_labels@judge and keyword-paper." in captions["safety_mirage_published"]
    benchmark = row.model_copy(update={"metrics": {"vqav2": share(1, 4)}})  # scored by official answers, not by a judge
    assert "judge" not in named_table(Summary(rows=[benchmark]), "rates").caption(intervals=False).lower()


def test_caption_contains_sample_sizes_and_failures(summary: Summary) -> None:
    failing = summary.rows[1].metrics["asr_attacked"].model_copy(update={"failed": 3})
    row = summary.rows[1].model_copy(update={"metrics": summary.rows[1].metrics | {"asr_attacked": failing}})
    rewrites = {"asr_attacked": [failing.model_copy(update={"failed": 1}), failing]}
    rows = [summary.rows[0], row.model_copy(update={"rewrites": rewrites, "paper": {"asr_attacked": failing}})]
    tables = summary_tables(Summary(rows=rows, comparisons=[]))
    captions = {name: table.caption(intervals=False) for name, table in tables.items()}
    for name in ("rewrites", "published"):
        assert "n = 40 (ASR attacked)." in captions[name]
        assert f"{FAILED}3 (ASR attacked)." in captions[name]  # each failure counts once
    assert f"n = 10 to 20 (ASR). {NONE_FAILED}" in captions["categories"]
    assert f"n = 40 ({split_title('unsafe_what')})" in captions["labels"]
    assert NONE_FAILED in named_table(summary, "comparisons").caption(intervals=False)


def test_categories_table_with_many_categories_has_them_as_lines(summary: Summary) -> None:
    many = {"asr": {f"category {i}": share(i, 30) for i in range(25)}}
    rows = [row.model_copy(update={"categories": many}) for row in summary.rows[:2]]
    table = named_table(Summary(rows=rows), "categories")
    assert [column.heading for column in table.columns] == ["metric", "category", "base", "npo"]
    assert len(table.lines) == 25
    line = parse_csv(render_table(table, "csv"))[1]
    assert (line["metric"], line["category"], line["model"], float(line["value"])) == ("asr", "category 0", "npo", 0.0)


def test_best_numbers_need_a_common_judge(summary: Summary) -> None:
    rows = [summary.rows[0], summary.rows[1].model_copy(update={"judges": {"asr": "another"}})]
    for name in ("rates", "safety_mirage"):
        best_columns = {column for _, column in named_table(Summary(rows=rows), name).best_cells()}
        assert 1 not in best_columns  # ASR has two judges
        assert 2 in best_columns


def test_safety_mirage_table(summary: Summary) -> None:
    lines = cells(render_table(named_table(summary, "safety_mirage"), "md", intervals=False))
    assert lines[0] == ["model", "ASR before", "ASR after", "RR before", "RR after", "VQAv2"]
    assert lines[3] == ["npo", "**5.0**", "**10.0**", "2.5", "10.0", "77.5"]
    published = cells(render_table(named_table(summary, "safety_mirage_published"), "md", intervals=False))
    assert published[2:] == [["npo", "50.0", "62.5", "2.5", "10.0", "77.5"]]  # only ASR has a published counting
    answers = cells(render_table(named_table(summary, "safety_mirage_answers"), "md"))
    assert answers[0] == ["model", "complied", "refused", "degenerate", "off topic", "failed"]
    assert answers[3] == ["npo", "10.0", "85.0", "2.5", "0.0", "2.5"]


def test_safe_eraser_table() -> None:
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
    without_efficacy = [row.model_copy(update={"metrics": {"sarr": share(1, 4)}}) for row in rows]
    assert "safe_eraser" not in summary_tables(Summary(rows=without_efficacy))


def test_missing_rate_is_a_dash_in_markdown_and_no_line_in_csv() -> None:
    rows = [
        Row(model="a", metrics={"asr": share(1, 4), "sarr": Rate(value=None, low=None, high=None, n=0)}),
        Row(model="b", metrics={}),
    ]
    table = named_table(Summary(rows=rows), "rates")
    assert cells(render_table(table, "md", intervals=False))[2:] == [["a", "25.0", "–"], ["b", "–", "–"]]
    assert len(parse_csv(render_table(table, "csv"))) == 1
    assert summary_tables(Summary(rows=[])) == {}


def test_markdown_names_stay_inside_their_cells() -> None:
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


def test_escaped_leaves_usual_names_unchanged() -> None:
    assert escaped("mixed_sft llava-1.5-7b: 4.1 po+pd") == "mixed_sft llava-1.5-7b: 4.1 po+pd"
    assert escaped("_x_ *y*") == r"\_x\_ \*y\*"


def test_named_table_unknown_or_without_data_raises(summary: Summary) -> None:
    with raises_code("unknown-name") as error:
        named_table(summary, "rats")
    assert 'did you mean "rates"' in str(error.value)
    with raises_code("unknown-name") as error:  # a summary does not contain the costs
        named_table(summary, "cost")
    assert str(error.value).count("cost") == 1
    with raises_code("no-records") as error:
        named_table(summary, "safe_eraser")
    assert "rates, comparisons" in str(error.value)


def test_named_table_accepts_the_deprecated_name(summary: Summary) -> None:
    with pytest.warns(FutureWarning, match='"rewrites"'):
        table = named_table(summary, "shots")
    assert table == named_table(summary, "rewrites")
