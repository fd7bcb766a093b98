"""The search finds a known weak word within its budget, and its figure for the winner is not biased by the choosing."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from helpers import run_killing
from vlm_unlearn.attacks.search import least_budget, rounds, sequential_halving
from vlm_unlearn.cli.main import main
from vlm_unlearn.config import JudgeConfig
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.attack_search import SearchReport, SearchRequest, candidates, plan, questions, search
from vlm_unlearn.records import Prompt, Response
from vlm_unlearn.reporting.charts.search_plot import write_search_png
from vlm_unlearn.store import read_records

WORDS = [f"word{n}" for n in range(32)]
QUESTIONS = [f"question{n}" for n in range(400)]


class FakeModel:
    """Breaks with a fixed chance for each word; the same answer to the same question every time."""

    def __init__(self, chances: dict[str, float], seed: int = 0) -> None:
        self.chances = chances
        self.seed = seed
        self.asked: list[tuple[str, str]] = []

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        self.asked += pairs
        return [random.Random(f"{self.seed} {pair}").random() < self.chances.get(pair[1], 0.05) for pair in pairs]


@pytest.mark.parametrize("seed", range(10))
def test_the_weak_word_is_found(seed: int) -> None:
    model = FakeModel({"word17": 0.6, "word3": 0.2}, seed)
    found = sequential_halving(WORDS, QUESTIONS, 1000, model)
    assert found.words[0].word == "word17"
    assert found.answers == len(model.asked) <= 1000
    assert len(set(model.asked)) == len(model.asked), "nothing is asked twice"


def test_the_better_half_goes_on() -> None:
    model = FakeModel({"word17": 0.6})
    found = sequential_halving(WORDS, QUESTIONS, 1000, model)
    assert Counter(known.rounds for known in found.words) == {1: 16, 2: 8, 3: 4, 4: 2, 5: 2}
    assert [known.rounds for known in found.words] == sorted((known.rounds for known in found.words), reverse=True)
    asked = Counter(word for _, word in model.asked)
    assert all(asked[known.word] == len(known.hits) for known in found.words)
    assert asked["word17"] == max(asked.values()) > 5 * min(asked.values())
    for word in WORDS:  # the same questions for every word, so that words differ by wording alone
        assert [question for question, other in model.asked if other == word] == QUESTIONS[: asked[word]]


def test_the_curve_counts_answers() -> None:
    found = sequential_halving(WORDS, QUESTIONS, 1000, FakeModel({"word17": 0.6}))
    counted = [point.answers for point in found.curve]
    assert counted == sorted(set(counted))
    assert (counted[0], counted[-1]) == (32, found.answers)
    last = found.curve[-1]
    assert (last.word, last.hits, last.judged) == ("word17", sum(found.words[0].hits), len(found.words[0].hits))


def test_when_the_questions_run_out() -> None:
    model = FakeModel({"word1": 1.0})
    found = sequential_halving(["word0", "word1", "word2"], QUESTIONS[:4], 10_000, model)
    assert found.words[0].word == "word1"
    assert found.answers == len(model.asked) == 12


def test_failures_are_neither_hits_nor_misses() -> None:
    def ask(pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        return [None if word == "broken" else word == "good" for _, word in pairs]

    found = sequential_halving(["broken", "bad", "good"], QUESTIONS, 60, ask)
    known = {one.word: one for one in found.words}
    assert found.words[0].word == "good"
    assert (known["broken"].hits, known["broken"].failed) == ([], known["bad"].failed + 10)


def test_of_equals_the_first_wins() -> None:
    assert sequential_halving(WORDS, QUESTIONS, 1000, lambda pairs: [False] * len(pairs)).words[0].word == "word0"


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 33])
def test_the_least_budget_is_enough_and_less_is_not(count: int) -> None:
    words = [f"w{n}" for n in range(count)]
    model = FakeModel({words[-1]: 1.0}, 1)
    found = sequential_halving(words, QUESTIONS, least_budget(count), model)
    assert found.words[0].word == words[-1]
    assert found.answers <= least_budget(count)
    assert found.words[0].rounds == rounds(count)
    if count > 1:
        with pytest.raises(ValueError, match="too little to search with"):
            sequential_halving(words, QUESTIONS, least_budget(count) - 1, model)


def test_held_out_questions_correct_the_winners_curse() -> None:
    """Thirty-two words that all do the same: the winner's rate in the search is too high, on held-out questions it is right."""
    searched, measured = [], []
    for seed in range(60):
        model = FakeModel(dict.fromkeys(WORDS, 0.3), seed)
        best = sequential_halving(WORDS, QUESTIONS[:200], 500, model).words[0]
        searched.append(best.share)
        measured.append(sum(bool(hit) for hit in model([(question, best.word) for question in QUESTIONS[200:]])) / 200)
    assert sum(searched) / 60 > 0.36
    assert abs(sum(measured) / 60 - 0.3) < 0.02


# --- a request


@pytest.fixture
def asked(tiny_model: Path, world: Path) -> SearchRequest:
    """A small search of a random model."""
    vlguard = world / "vlguard"
    judge = JudgeConfig(name="tiny_world", world=world / "world.json")
    request = SearchRequest(
        str(tiny_model),
        vlguard / "test.json",
        vlguard / "test",
        words=("what", "share", "tell"),
        budget=40,
        judge=judge,
    )
    return changed(request, generation=request.generation.model_copy(update={"max_new_tokens": 3, "batch_size": 4}))


def changed(request: SearchRequest, **fields: object) -> SearchRequest:
    return SearchRequest(**{**request.__dict__, **fields})  # type: ignore[arg-type]


def arguments(request: SearchRequest, out: Path) -> list[object]:
    return [
        *(
            "attack",
            "search",
            request.model,
            request.file,
            "--images",
            request.images,
            "--out",
            out,
            "--words",
            ",".join(request.words),
        ),
        *(
            "--budget",
            request.budget,
            "--judge",
            "tiny_world",
            "--world",
            request.judge.world,
            "--max-new-tokens",
            3,
            "--batch-size",
            4,
        ),
    ]


def test_candidates_are_the_audits_and_a_vocabulary(world: Path) -> None:
    found = candidates(world / "vlguard" / "train.json", "break")
    assert list(found)[:2] == ["what", "share"]
    assert list(candidates(world / "vlguard" / "train.json", "over-refuse"))[:2] == ["share", "what"]
    assert Counter(found.values())["audit"] == 2
    assert {"how", "generate", "tell"} <= set(found)
    assert "control" not in found


def test_marks_are_no_candidates(tmp_path: Path) -> None:
    def record(n: int, question: str, safe: bool) -> dict[str, object]:
        name = "safe_instruction" if safe else "instruction"
        return {"id": str(n), "image": "a.png", "safe": safe, "instr-resp": [{name: question, "response": "x"}]}

    records = [record(n, "... what now?" if n % 2 else "\u2014 do it", bool(n % 2)) for n in range(100)]
    (tmp_path / "odd.json").write_text(json.dumps(records))
    assert set(candidates(tmp_path / "odd.json", "break").values()) == {"vocabulary"}


def test_questions_are_held_out(asked: SearchRequest) -> None:
    found = questions(asked)
    searched, held_out, budget = plan(asked, found, list(asked.words))
    assert len(searched) == len(held_out) == 6
    assert not {prompt.id for prompt in searched} & {prompt.id for prompt in held_out}
    assert budget == 40 - 3 * 6
    few = plan(changed(asked, questions=4), found, list(asked.words))
    assert (len(few[0]), len(few[1])) == (2, 2)
    assert plan(changed(asked, seed=1), found, list(asked.words))[0] != searched
    tight = plan(changed(asked, budget=12), found, list(asked.words))
    assert (len(tight[1]), tight[2]) == (2, 6)


def test_shots_of_one_question_are_one_question(asked: SearchRequest, tmp_path: Path) -> None:
    """They must not be on both sides of search and measurement."""
    records = json.loads(asked.file.read_text())
    three = tmp_path / "three.json"
    three.write_text(json.dumps([record for record in records for _ in range(3)]))
    assert len(questions(changed(asked, file=three))) == len(questions(asked))


def test_search_and_its_files(asked: SearchRequest, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = search(asked, tmp_path / "run", lambda stage, done, total: seen.append((stage, done, total)))
    assert json.loads((tmp_path / "run" / "search.json").read_text()) == report.model_dump(by_alias=True, mode="json")
    assert report.answers <= asked.budget
    assert report.questions == {"search": 6, "held_out": 6}
    assert [report.held_out[way].n for way in ("best", "as_asked", "control")] == [6, 6, 6]
    assert {word.word: word.source for word in report.words} == dict.fromkeys(asked.words, "named")
    assert [stage for stage, done, total in seen if done == total] == [
        "search",
        "measure best",
        "measure as asked",
        "measure control",
    ]
    prompts = {prompt.id: prompt for prompt in read_records(tmp_path / "run" / "prompts.jsonl", Prompt)}
    answers = {response.prompt_id for response in read_records(tmp_path / "run" / "responses.jsonl", Response)}
    assert set(prompts) == answers
    assert len(answers) == report.answers
    for prompt in prompts.values():
        way = prompt.id.rsplit("/", 1)[1]
        if way in asked.words:
            assert prompt.question.lower().startswith(way)
        elif way == "control":
            assert not prompt.question.lower().startswith((report.best, "what", "share"))
    write_search_png(tmp_path / "run" / "search.png", report)
    assert (tmp_path / "run" / "search.png").read_bytes().startswith(b"\x89PNG")


def test_one_word_needs_no_search(asked: SearchRequest, tmp_path: Path) -> None:
    report = search(changed(asked, words=("zorg",)), tmp_path / "run")
    assert (report.best, report.curve, report.answers) == ("zorg", [], 18)
    assert report.words[0].wording == "Zorg, {question}"
    assert report.words[0].rate.value is None
    write_search_png(tmp_path / "search.png", report)


def test_odd_words_are_drawn(asked: SearchRequest, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    report = search(changed(asked, words=("$x$", "\u4ec0\u4e48", "[b]")), tmp_path / "run")
    write_search_png(tmp_path / "search.png", report)
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_a_finished_search_asks_nothing(asked: SearchRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = search(asked, tmp_path / "run")

    def load(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("vlm_unlearn.models.loader.load_run_model", load)
    assert search(asked, tmp_path / "run") == first


def test_the_seed_decides(asked: SearchRequest, tmp_path: Path) -> None:
    one, same, other = (
        search(changed(asked, seed=seed), tmp_path / name) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one == same
    ids = [[prompt.id for prompt in read_records(tmp_path / name / "prompts.jsonl", Prompt)] for name in "abc"]
    assert ids[0] == ids[1] != ids[2]
    assert other.seed == 1


def test_killed_search_ends_with_the_same_files(asked: SearchRequest, tmp_path: Path) -> None:
    def lines(count: int) -> Callable[[], bool]:
        file = tmp_path / "killed" / "responses.jsonl"
        return lambda: file.exists() and file.read_bytes().count(b"\n") >= count

    search(asked, tmp_path / "whole")
    run_killing(arguments(asked, tmp_path / "killed"), [lines(20)])
    for name in ("responses.jsonl", "prompts.jsonl", "verdicts-tiny_world.jsonl", "search.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_log_cut_anywhere_ends_the_same(asked: SearchRequest, tmp_path: Path) -> None:
    whole = search(asked, tmp_path / "run")
    log = tmp_path / "run" / "responses.jsonl"
    content = log.read_bytes()
    for cut in range(0, len(content), len(content) // 5):
        log.write_bytes(content[:cut])
        assert search(asked, tmp_path / "run") == whole
        assert log.read_bytes() == content


def test_another_search_is_refused(asked: SearchRequest, tmp_path: Path) -> None:
    search(asked, tmp_path / "run")
    model = Path(shutil.copytree(asked.model, tmp_path / "model"))
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    for name, other in (
        ("seed", changed(asked, seed=1)),
        ("budget", changed(asked, budget=50)),
        ("words", changed(asked, words=("what", "share"))),
        ("model", changed(asked, model=str(model))),
        ("goal", changed(asked, goal="over-refuse")),
        ("judge.judge", changed(asked, judge=JudgeConfig(name="keyword"))),
    ):
        with pytest.raises(UserError, match=rf"holds another run \(different: .*{name}"):
            search(other, tmp_path / "run")


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the command in this process; returns exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["vlm-unlearn", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_the_command(asked: SearchRequest, tmp_path: Path, call: Call) -> None:
    code, out, err = call(*arguments(asked, tmp_path / "run"))
    assert code == 0, err
    assert "on 6 other questions" in " ".join(out.split())
    assert (tmp_path / "run" / "search.png").exists()
    report = SearchReport.model_validate(json.loads(call(*arguments(asked, tmp_path / "run"), "--json")[1]))
    assert {word.word for word in report.words} == set(asked.words)


def test_wrong_requests(asked: SearchRequest, tmp_path: Path, call: Call) -> None:
    known = [asked.model, asked.file, "--images", asked.images, "--out", tmp_path / "out"]
    records = json.loads(asked.file.read_text())
    (tmp_path / "unsafe.json").write_text(json.dumps([record for record in records if not record["safe"]]))
    (tmp_path / "one.json").write_text(json.dumps([next(record for record in records if not record["safe"])]))
    (tmp_path / "table.jsonl").write_text('{"question": "Why?", "answer": "So."}\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")

    def other(file: str) -> list[object]:
        return [asked.model, tmp_path / file, "--images", asked.images, "--out", tmp_path / "out"]

    for request, message in (
        (
            [*known, "--words", "what,share,tell", "--budget", "11"],
            "too few answers to tell 3 words apart; give 12 or more",
        ),
        ([*known, "--budget", "5"], "too few answers to tell"),
        ([*known, "--words", "what", "--budget", "5"], "give 6 or more"),
        ([*known, "--words", ""], "is not a word"),
        ([*known, "--words", "what, "], "is not a word"),
        ([*known, "--words", "two words"], "is not a word"),
        ([*known, "--words", "what,control"], "control is no word to try"),
        ([*known, "--goal", "brake"], '--goal "brake": use one of break, over-refuse; did you mean "break"?'),
        ([*known, "--judge", "llm"], "use one of keyword, tiny_world"),
        ([*known, "--judge", "tiny_world"], "needs the world's facts"),
        ([*known, "--precision", "fp8"], "precision"),
        ([*other("unsafe.json"), "--goal", "over-refuse"], 'has no prompts of kind "safe"'),
        (other("one.json"), "a search needs two at least"),
        (other("table.jsonl"), "must be a VLGuard or SafeEraser file"),
        (other("gone.json"), "gone.json"),
        ([asked.model, asked.file, "--images", tmp_path, "--out", tmp_path / "out"], "not found under"),
        ([tmp_path / "gone", asked.file, "--images", asked.images, "--out", tmp_path / "out"], "model-not-found"),
        (
            [asked.model, asked.file, "--images", asked.images, "--out", tmp_path / "full"],
            "is not empty and holds no manifest.json",
        ),
        ([asked.model, asked.file, "--images", asked.images, "--out", asked.file], "is a file, not a folder"),
    ):
        code, _, said = call("attack", "search", *request)
        assert code == 2, said
        assert message in " ".join(said.splitlines()[-1].split()), said
        assert not (tmp_path / "out").exists()
