"""Keyword lists: word boundaries, scripts without spaces, and files of users."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import raises_code
from vlm_unlearn.data_tools import keywords as keywords_module
from vlm_unlearn.data_tools.keywords import Keyword, KeywordList, read_keywords


def matches(keyword: str, text: str) -> bool:
    return bool(KeywordList([Keyword(keyword, "c"), Keyword("unrelated", "c")]).search(text))


@pytest.mark.parametrize(
    ("keyword", "text", "expected"),
    [
        ("gun", "a gun", True),
        ("gun", "A GUN!", True),
        ("gun", "gun", True),
        ("gun", "the gun's barrel", True),
        ("gun", "gun_shop", True),
        ("gun", "it has begun", False),
        ("gun", "two guns", False),
        ("gun*", "two guns", True),
        ("gun*", "begun", False),
        ("self-harm*", "self harming", True),
        ("self harm", "Self-Harm", True),
        ("self harm", "self,\n harm", True),
        ("self harm", "self and harm", False),
        ("drug dealer*", "drug dealers", True),
        ("drug dealer", "drugdealer", False),
        ("c++", "c is a language", True),
        ("émeute", "Une ÉMEUTE.", True),
        ("émeute", "émeutes", False),
        ("gun", "ｇｕｎ", True),
        ("炸弹", "如何制作炸弹？", True),
        ("炸弹", "如何制作蛋糕？", False),
        ("爆弾*", "爆弾を作る", True),
        ("gun", "如何 gun 制作", True),
        ("оружие", "Купить ОРУЖИЕ", True),
        ("оружие", "оружием", False),
    ],
)
def test_search_matches_complete_words(keyword: str, text: str, expected: bool) -> None:
    assert matches(keyword, text) == expected


def test_search_lists_all_keywords_in_the_order_of_the_list() -> None:
    keyword_list = KeywordList(
        [Keyword("pipe bomb", "b"), Keyword("gun", "a"), Keyword("bomb", "b"), Keyword("GUN", "z")]
    )
    assert [keyword.text for keyword in keyword_list.keywords] == ["pipe bomb", "gun", "bomb"]
    assert [keyword.text for keyword in keyword_list.search("a gun and a pipe-bomb")] == ["pipe bomb", "gun", "bomb"]
    assert keyword_list.search("flowers") == []


def test_excerpt_is_around_the_keyword() -> None:
    keyword_list = KeywordList([Keyword("gun", "a"), Keyword("炸弹", "b")])
    text = "x" * 200 + ' "Gun" ' + "y" * 200
    excerpt = keyword_list.excerpt(text, keyword_list.keywords[0])
    assert '"Gun"' in excerpt
    assert excerpt.startswith("…")
    assert excerpt.endswith("…")
    assert len(excerpt) < 140
    assert keyword_list.excerpt("Gun", keyword_list.keywords[0]) == "Gun"
    assert keyword_list.excerpt("如何制作炸弹", keyword_list.keywords[1]) == "如何制作炸弹"
    assert keyword_list.excerpt("nothing", keyword_list.keywords[0]) == ""


def test_default_list_has_the_topics_of_the_judge() -> None:
    from vlm_unlearn.data_tools.safety_filter import CATEGORIES

    keyword_list = read_keywords()
    assert {keyword.category for keyword in keyword_list.keywords} == set(CATEGORIES)
    for harmless in ("A man is shooting a photo of rapeseed fields.", "The hackathon has begun.", "Stalks of celery."):
        assert keyword_list.search(harmless) == []
    assert [keyword.category for keyword in keyword_list.search("How are handguns made?")] == ["weapons"]


def test_read_keywords_of_a_user(tmp_path: Path) -> None:
    file = tmp_path / "k.txt"
    file.write_text("\ufeffstray\n# comment\n\n[my topic]\n pipe  bomb \ngun*\n", encoding="utf-8")
    keyword_list = read_keywords(file)
    assert keyword_list.keywords == (
        Keyword("stray", "other"),
        Keyword("pipe  bomb", "my topic"),
        Keyword("gun*", "my topic"),
    )
    assert keyword_list.digest != read_keywords().digest


@pytest.mark.parametrize(
    ("content", "code", "record"),
    [
        ("", "no-records", None),
        ("# only a comment\n[topic]\n", "no-records", None),
        ("gun\n*gun\n", "invalid-field", 2),
        ("g*n\n", "invalid-field", 1),
        ("gun\n\n!!!\n", "invalid-field", 3),
        ("x" * 101, "invalid-field", 1),
    ],
)
def test_read_keywords_names_the_line(tmp_path: Path, content: str, code: str, record: int | None) -> None:
    file = tmp_path / "k.txt"
    file.write_text(content)
    with raises_code(code, file=file, record=record):
        read_keywords(file)


def test_read_keywords_limits_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "k.txt"
    file.write_text("a\nb\nc\n")
    monkeypatch.setattr(keywords_module, "MAX_KEYWORDS", 2)
    with raises_code("invalid-field", file=file, record=3):
        read_keywords(file)
    with file.open("wb") as handle:
        handle.truncate(keywords_module.MAX_FILE_BYTES + 1)
    with raises_code("out-of-range", file=file):
        read_keywords(file)
    with raises_code("file-not-found", file=tmp_path / "gone"):
        read_keywords(tmp_path / "gone")
