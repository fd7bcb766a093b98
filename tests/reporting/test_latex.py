"""LaTeX of the tables: it is well-formed, and names from data files do not act as TeX commands."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vlm_unlearn.metrics.rates import rate
from vlm_unlearn.records import Comparison, Rate, Row, Summary
from vlm_unlearn.reporting.tables.latex import escaped, latex
from vlm_unlearn.reporting.tables.summary_tables import named_table, summary_tables, write_tables

HOSTILE = [
    r"\input{/etc/passwd}",
    r"a_b % c & d # e $f$ {g} ~h ^i \j",
    "[x]",
    "*",
    "-- `` '' ?` !` <<x>> \"q\" |",
    "}\\end{tabular}",
    "b\u202ec\x00d\ud800 中文 αβ 🙂",
    "Zürich Łódź naïve Ångström ð",
    "line\nbreak\\\\",
    "long " * 200_000,
]


def share(hits: int, n: int) -> Rate:
    return rate([i < hits for i in range(n)], [str(i) for i in range(n)])


@pytest.fixture
def summary() -> Summary:
    """A summary with data for every table and hostile names everywhere."""
    metrics = ("asr", "asr_attacked", "refusal_rate", "efficacy_asr", "sarr", "gqa")
    rows = [
        Row(
            model=name,
            judge=name[:100],
            metrics={metric: share(1, 4) for metric in (*metrics, name)},
            paper={metric: share(1, 3) for metric in ("asr", "asr_attacked", "efficacy_asr", name)},
            labels={"unsafe_what": {"complied": 1, "refused": 2}, name: {"complied": 1}},
            categories={name: {name: share(1, 4)}},
            rewrites={name: [share(1, 4), share(2, 4)]},
        )
        for name in HOSTILE
    ]
    ends = {"difference": -0.5, "low": -0.6, "high": -0.4, "p": 0.0001, "p_adjusted": 0.001, "n": 40}
    comparisons = [Comparison(model=name, base=HOSTILE[0], metric=name, test="mcnemar", **ends) for name in HOSTILE]
    return Summary(rows=rows, comparisons=comparisons)


def tabulars(text: str) -> list[tuple[str, list[str]]]:
    """Returns column specification and lines of each tabular. Every other line must be one of booktabs' rules."""
    parsed = []
    for spec, body in re.findall(
        r"\\begin\{tabular\}\{@\{\}([lr]+)@\{\}\}\n(.*?)\n\\end\{tabular\}", text, flags=re.DOTALL
    ):
        lines = []
        for line in body.split("\n"):
            if not re.fullmatch(r"\\(top|mid|bottom)rule|\\addlinespace\[2pt\]|(\\cmidrule\(lr\)\{\d+-\d+\} ?)+", line):
                end = re.search(r" \\\\(\[-2pt\])?$", line)
                assert end, line
                lines.append(line[: end.start()])
        parsed.append((spec, lines))
    return parsed


def count_columns(line: str) -> int:
    spans = [int(span) for span in re.findall(r"\\multicolumn\{(\d+)\}", line)]
    return len(re.findall(r"(?<!\\)&", line)) + 1 + sum(spans) - len(spans)


def balanced(text: str) -> bool:
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text.replace(r"\\", "")):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


@pytest.mark.parametrize("intervals", [True, False])
def test_latex_every_line_has_all_columns(summary: Summary, intervals: bool) -> None:
    costs = {name: {"time": name, name: "1 s"} for name in HOSTILE}
    tables = summary_tables(summary, costs)
    assert len(tables) == 12
    for name, table in tables.items():
        text = latex(table, intervals)
        assert set(text) <= {"\n", *map(chr, range(32, 127))}, name
        assert balanced(text), name
        parsed = tabulars(text)
        assert text.count(r"\begin{tabular}") == len(parsed) >= 1
        for spec, lines in parsed:
            assert len(spec) == len(table.columns), name
            assert [count_columns(line) for line in lines] == [len(spec)] * len(lines), name
        assert (r"{\tiny [" in text) is (
            intervals and any(cell and cell.interval for line in table.lines for cell in line)
        ), name


def test_escaped_special_characters() -> None:
    assert (
        escaped("a_b % & # $ {} ~ ^ \\")
        == r"a\_b \% \& \# \$ \{\} \textasciitilde{} \textasciicircum{} \textbackslash{}"
    )
    assert escaped("[x]*") == "{[}x{]}{*}"  # at the start of a line they would be arguments of the preceding line end
    assert escaped("a--b ''c") == "a-{}-b '{}'c"
    assert escaped("Zürich, Łódź") == r"Z\"{u}rich, \L{}\'{o}d\'{z}"
    assert escaped("中\u202e\ud800\x00") == "{U+4E2D}{U+202E}{U+D800}{U+0000}"
    assert escaped("<b>") == "$<$b$>$"
    assert escaped('begin with "What" ("Share")') == "begin with ``What'' (``Share'')"
    assert escaped("a\n b") == "a b"
    assert escaped("x" * 100).endswith(r"x\ldots{}")


def test_latex_table_of_a_paper() -> None:
    """Groups above their columns, the best numbers in bold, intervals in small print below, significance marks."""
    rows = [
        Row(
            model=name,
            judge="j",
            metrics={"asr": share(a, 40), "asr_attacked": share(b, 40), "refusal_rate": share(0, 40)},
        )
        for name, a, b in (("base", 20, 40), ("n_po", 10, 20))
    ]
    change = Comparison(
        model="n_po",
        base="base",
        metric="asr",
        difference=-0.25,
        low=-0.4,
        high=-0.1,
        p=0.001,
        p_adjusted=0.001,
        test="mcnemar",
        n=40,
    )
    summary = Summary(rows=rows, comparisons=[change])
    text = latex(named_table(summary, "safety_mirage"), intervals=False)
    assert r"\label{tab:safety-mirage}" in text
    assert text.split(r"\toprule")[1].splitlines()[1:7] == [
        r" & \multicolumn{2}{c}{ASR} & \multicolumn{1}{c}{RR} \\",
        r"\cmidrule(lr){2-3} \cmidrule(lr){4-4}",
        r"model & before & after & before \\",
        r"\midrule",
        r"base & 50.0 & 100.0 & \textbf{0.0} \\",
        r"n\_po & \textbf{25.0} & \textbf{50.0} & \textbf{0.0} \\",
    ]
    rates = latex(named_table(summary, "rates"))
    assert r"n\_po & \textbf{25.0}\rlap{$^{*}$} & \textbf{50.0} & \textbf{0.0} \\[-2pt]" in rates
    assert r" & {\tiny [14.2, 40.2]} & {\tiny [35.2, 64.8]} & {\tiny [0.0, 8.8]} \\" in rates
    assert (
        r"\caption{Rates in \%. Judged by j. n = 40 (ASR, ASR attacked, Refusals). None failed. {*} differs from base"
        in rates
    )
    rewrites = [Row(model=name, metrics={}, rewrites={"asr": [share(1, 4)]}) for name in ("a", "b")]
    text = latex(named_table(Summary(rows=rewrites), "rewrites"), intervals=False)
    lines = tabulars(text)[0][1]
    assert [line.split(" & ")[:2] for line in lines[1:]] == [["ASR", "a"], ["", "b"]]  # a repeated name is omitted
    assert r"$-$25.0\rlap{$^{*}$}" in latex(named_table(summary, "comparisons"))


def test_latex_long_table_is_split_into_floats(summary: Summary) -> None:
    rows = [Row(model=f"m{number}", metrics={"asr": share(number, 100)}) for number in range(80)]
    text = latex(named_table(Summary(rows=rows), "rates"), intervals=False)
    assert re.findall(r"\\label\{(.*?)\}", text) == ["tab:rates", "tab:rates-2", "tab:rates-3"]
    assert [
        line.split(" ")[0]
        for _, lines in tabulars(text)
        for line in lines
        if line.startswith("m") and line[1].isdigit()
    ] == [f"m{number}" for number in range(80)]
    assert text.count(r"\textbf{") == 1  # the best number of the entire table
    assert "Part 3 of 3." in text


def test_latex_very_long_table_has_clearpages() -> None:
    rows = [Row(model=f"m{number}", metrics={"asr": share(1, 4)}) for number in range(18 * 40)]
    text = latex(named_table(Summary(rows=rows), "rates"))
    floats = [pages.count(r"\end{table") for pages in text.split("\n\\clearpage\n")]
    assert floats == [15, 15, 10]


@pytest.mark.slow
def test_latex_compiles_with_pdftex(summary: Summary, tmp_path: Path) -> None:
    if (
        shutil.which("pdflatex") is None
        or subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True, check=False).returncode
    ):
        pytest.skip("needs pdflatex with booktabs (Debian: texlive-latex-base, texlive-latex-recommended)")
    files = [
        file
        for file in write_tables(tmp_path, summary, {HOSTILE[0]: {HOSTILE[1]: HOSTILE[2]}})
        if file.suffix == ".tex"
    ]
    inputs = "\n".join(rf"\input{{{file.relative_to(tmp_path).as_posix()}}}\clearpage" for file in files)
    (tmp_path / "all.tex").write_text(
        f"\\documentclass{{article}}\n\\usepackage{{booktabs}}\n\\begin{{document}}\n{inputs}\n\\end{{document}}\n"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "all.pdf").stat().st_size > 10_000
