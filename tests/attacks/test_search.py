"""Tests of the attack search: it finds a weak word within its budget, and its rate of the winner is unbiased."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from helpers import error_code, raises_code, run_in_process, run_killing
from vlm_unlearn.attacks.search import count_rounds, min_budget, sequential_halving
from vlm_unlearn.config import JudgeConfig
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.attack_search import (
    SearchReport,
    SearchRequest,
    candidate_words,
    read_prompts,
    search,
    split_questions,
)
from vlm_unlearn.records import Prompt, Response
from vlm_unlearn.reporting.charts.search_plot import write_search_png
from vlm_unlearn.store import read_records

WORDS = [f"word{n}" for n in range(32)]
QUESTIONS = [f"question{n}" for n in range(400)]


class FakeModel:
    """Breaks with a fixed probability for each word. Equal questions get equal answers."""

    def __init__(self, probabilities: dict[str, float], seed: int = 0) -> None:
        self.probabilities = probabilities
        self.seed = seed
        self.pairs: list[tuple[str, str]] = []

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        self.pairs += pairs
        return [random.Random(f"{self.seed} {pair}").random() < self.probabilities.get(pair[1], 0.05) for pair in pairs]


@pytest.mark.parametrize("seed", range(10))
def test_search_finds_the_weak_word(seed: int) -> None:
    model = FakeModel({"word17": 0.6, "word3": 0.2}, seed)
    result = sequential_halving(WORDS, QUESTIONS, 1000, model)
    assert result.words[0].word == "word17"
    assert result.answers == len(model.pairs) <= 1000
    assert len(set(model.pairs)) == len(model.pairs), "no question is asked twice"


def test_each_round_keeps_the_better_half() -> None:
    model = FakeModel({"word17": 0.6})
    result = sequential_halving(WORDS, QUESTIONS, 1000, model)
    rounds = [word.rounds for word in result.words]
    assert Counter(rounds) == {1: 16, 2: 8, 3: 4, 4: 2, 5: 2}
    assert rounds == sorted(rounds, reverse=True)
    counts = Counter(word for _, word in model.pairs)
    assert all(counts[word.word] == len(word.hits) for word in result.words)
    assert counts["word17"] == max(counts.values()) > 5 * min(counts.values())
    for word in WORDS:  # every word gets the same questions, so that words differ by wording alone
        assert [question for question, pair_word in model.pairs if pair_word == word] == QUESTIONS[: counts[word]]


def test_curve_counts_answers() -> None:
    result = sequential_halving(WORDS, QUESTIONS, 1000, FakeModel({"word17": 0.6}))
    answers = [leader.answers for leader in result.curve]
    assert answers == sorted(set(answers))
    assert (answers[0], answers[-1]) == (32, result.answers)
    last = result.curve[-1]
    assert (last.word, last.hits, last.judged) == ("word17", sum(result.words[0].hits), len(result.words[0].hits))


def test_search_stops_when_the_questions_run_out() -> None:
    model = FakeModel({"word1": 1.0})
    result = sequential_halving(["word0", "word1", "word2"], QUESTIONS[:4], 10_000, model)
    assert result.words[0].word == "word1"
    assert result.answers == len(model.pairs) == 12


def test_failures_are_neither_hits_nor_misses() -> None:
    def ask(pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        return [None if word == "broken" else word == "good" for _, word in pairs]

    result = sequential_halving(["broken", "bad", "good"], QUESTIONS, 60, ask)
    results = {word.word: word for word in result.words}
    assert result.words[0].word == "good"
    assert (results["broken"].hits, results["broken"].failed) == ([], results["bad"].failed + 10)


def test_first_of_equal_words_wins() -> None:
    assert sequential_halving(WORDS, QUESTIONS, 1000, lambda pairs: [False] * len(pairs)).words[0].word == "word0"


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 33])
def test_min_budget_is_enough_and_less_raises(count: int) -> None:
    words = [f"w{n}" for n in range(count)]
    model = FakeModel({words[-1]: 1.0}, 1)
    result = sequential_halving(words, QUESTIONS, min_budget(count), model)
    assert result.words[0].word == words[-1]
    assert result.answers <= min_budget(count)
    assert result.words[0].rounds == count_rounds(count)
    if count > 1:
        with raises_code("out-of-range"):
            sequential_halving(words, QUESTIONS, min_budget(count) - 1, model)


def test_held_out_questions_remove_the_bias_of_the_selection() -> None:
    """All 32 words have the same rate. The winner's rate is too high in the search, and right on held-out questions."""
    searched, measured = [], []
    for seed in range(60):
        model = FakeModel(dict.fromkeys(WORDS, 0.3), seed)
        best = sequential_halving(WORDS, QUESTIONS[:200], 500, model).words[0]
        searched.append(best.hit_rate)
        measured.append(sum(bool(hit) for hit in model([(question, best.word) for question in QUESTIONS[200:]])) / 200)
    assert sum(searched) / 60 > 0.36
    assert abs(sum(measured) / 60 - 0.3) < 0.02


# --- a request


@pytest.fixture(scope="module")
def small_search(tiny_model: Path, world: Path) -> SearchRequest:
    """A small search with a random model."""
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


@pytest.fixture(scope="module")
def searched(small_search: SearchRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small search, after its end. Tests that change it copy it."""
    folder = tmp_path_factory.mktemp("searched") / "run"
    search(small_search, folder)
    return folder


@pytest.fixture
def run_copy(searched: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(searched, tmp_path / "run"))


def report_of(folder: Path) -> SearchReport:
    return SearchReport.model_validate_json((folder / "search.json").read_text())


def changed(request: SearchRequest, **fields: object) -> SearchRequest:
    return SearchRequest(**{**request.__dict__, **fields})  # type: ignore[arg-type]


def arguments(request: SearchRequest, out: Path) -> list[object]:
    search = ["attack", "search", request.model, request.file, "--images", request.images, "--out", out]
    words = ["--words", ",".join(request.words), "--budget", request.budget]
    judge = ["--judge", "tiny_world", "--world", request.judge.world]
    return [*search, *words, *judge, "--max-new-tokens", 3, "--batch-size", 4]


def test_candidate_words_are_those_of_the_audit_and_a_vocabulary(world: Path) -> None:
    words = candidate_words(world / "vlguard" / "train.json", "break")
    assert list(words)[:2] == ["what", "share"]
    assert list(candidate_words(world / "vlguard" / "train.json", "over-refuse"))[:2] == ["share", "what"]
    assert Counter(words.values())["audit"] == 2
    assert {"how", "generate", "tell"} <= set(words)
    assert "control" not in words


def test_candidate_words_leave_out_punctuation(tmp_path: Path) -> None:
    def record(n: int, question: str, safe: bool) -> dict[str, object]:
        name = "safe_instruction" if safe else "instruction"
        return {"id": str(n), "image": "a.png", "safe": safe, "instr-resp": [{name: question, "response": "x"}]}

    records = [record(n, "... what now?" if n % 2 else "\u2014 do it", bool(n % 2)) for n in range(100)]
    (tmp_path / "odd.json").write_text(json.dumps(records))
    assert set(candidate_words(tmp_path / "odd.json", "break").values()) == {"vocabulary"}


def test_split_questions_holds_out_half_of_them(small_search: SearchRequest) -> None:
    prompts = read_prompts(small_search)
    search_prompts, held_out, budget = split_questions(small_search, prompts, list(small_search.words))
    assert len(search_prompts) == len(held_out) == 6
    assert not {prompt.id for prompt in search_prompts} & {prompt.id for prompt in held_out}
    assert budget == 40 - 3 * 6
    few = split_questions(changed(small_search, questions=4), prompts, list(small_search.words))
    assert (len(few[0]), len(few[1])) == (2, 2)
    assert split_questions(changed(small_search, seed=1), prompts, list(small_search.words))[0] != search_prompts
    tight = split_questions(changed(small_search, budget=12), prompts, list(small_search.words))
    assert (len(tight[1]), tight[2]) == (2, 6)


def test_read_prompts_returns_one_rewrite_per_question(small_search: SearchRequest, tmp_path: Path) -> None:
    """Rewrites of one question must not be in both the search and the measurement."""
    records = json.loads(small_search.file.read_text())
    three = tmp_path / "three.json"
    three.write_text(json.dumps([record for record in records for _ in range(3)]))
    assert len(read_prompts(changed(small_search, file=three))) == len(read_prompts(small_search))


def test_search_writes_its_files(small_search: SearchRequest, tmp_path: Path) -> None:
    progress: list[tuple[str, int, int]] = []
    report = search(small_search, tmp_path / "run", lambda stage, done, total: progress.append((stage, done, total)))
    assert json.loads((tmp_path / "run" / "search.json").read_text()) == report.model_dump(by_alias=True, mode="json")
    assert report.answers <= small_search.budget
    assert report.questions == {"search": 6, "held_out": 6}
    assert [report.held_out[condition].n for condition in ("best", "as_asked", "control")] == [6, 6, 6]
    assert {word.word: word.source for word in report.words} == dict.fromkeys(small_search.words, "named")
    assert [stage for stage, done, total in progress if done == total] == [
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
        condition = prompt.id.rsplit("/", 1)[1]
        if condition in small_search.words:
            assert prompt.question.lower().startswith(condition)
        elif condition == "control":
            assert not prompt.question.lower().startswith((report.best, "what", "share"))
    write_search_png(tmp_path / "run" / "search.png", report)
    assert (tmp_path / "run" / "search.png").read_bytes().startswith(b"\x89PNG")


def test_search_with_one_word_only_measures(small_search: SearchRequest, tmp_path: Path) -> None:
    report = search(changed(small_search, words=("zorg",)), tmp_path / "run")
    assert (report.best, report.curve, report.answers) == ("zorg", [], 18)
    assert report.words[0].wording == "Zorg, {question}"
    assert report.words[0].rate.value is None
    write_search_png(tmp_path / "search.png", report)


def test_search_plot_draws_odd_words(
    small_search: SearchRequest, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    report = search(changed(small_search, words=("$x$", "\u4ec0\u4e48", "[b]")), tmp_path / "run")
    write_search_png(tmp_path / "search.png", report)
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_finished_search_does_not_load_the_model(
    small_search: SearchRequest, run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def load(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("vlm_unlearn.modeling.loader.load_run_model", load)
    assert search(small_search, run_copy) == report_of(run_copy)


def test_search_depends_on_its_seed(small_search: SearchRequest, searched: Path, tmp_path: Path) -> None:
    repeated, other = (search(changed(small_search, seed=seed), tmp_path / name) for name, seed in (("b", 0), ("c", 1)))
    assert repeated == report_of(searched)
    folders = (searched, tmp_path / "b", tmp_path / "c")
    ids = [[prompt.id for prompt in read_records(folder / "prompts.jsonl", Prompt)] for folder in folders]
    assert ids[0] == ids[1] != ids[2]
    assert other.seed == 1


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(240)
def test_killed_search_ends_with_the_same_files(small_search: SearchRequest, tmp_path: Path) -> None:
    def lines(count: int) -> Callable[[], bool]:
        file = tmp_path / "killed" / "responses.jsonl"
        return lambda: file.exists() and file.read_bytes().count(b"\n") >= count

    search(small_search, tmp_path / "complete")
    run_killing(arguments(small_search, tmp_path / "killed"), [lines(20)])
    for name in ("responses.jsonl", "prompts.jsonl", "verdicts-tiny_world.jsonl", "search.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "complete" / name).read_bytes(), name


def test_search_with_a_truncated_log_ends_with_the_same_files(small_search: SearchRequest, run_copy: Path) -> None:
    report = report_of(run_copy)
    log = run_copy / "responses.jsonl"
    content = log.read_bytes()
    for size in range(0, len(content), len(content) // 5):
        log.write_bytes(content[:size])
        assert search(small_search, run_copy) == report
        assert log.read_bytes() == content


def test_search_into_the_folder_of_another_search_raises(
    small_search: SearchRequest, run_copy: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(small_search.model, tmp_path / "model"))
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    for name, other in (
        ("seed", changed(small_search, seed=1)),
        ("budget", changed(small_search, budget=50)),
        ("words", changed(small_search, words=("what", "share"))),
        ("model", changed(small_search, model=str(model))),
        ("goal", changed(small_search, goal="over-refuse")),
        ("judge.judge", changed(small_search, judge=JudgeConfig(name="keyword"))),
    ):
        with pytest.raises(UserError) as caught:
            search(other, run_copy)
        assert name in str(caught.value)


def test_search_command_prints_the_result(small_search: SearchRequest, tmp_path: Path) -> None:
    done = run_in_process(*arguments(small_search, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "search.png").exists()
    assert str(tmp_path / "run" / "search.json") in done.stdout.replace("\n", "")
    report = SearchReport.model_validate(
        json.loads(run_in_process(*arguments(small_search, tmp_path / "run"), "--json").stdout)
    )
    assert {word.word for word in report.words} == set(small_search.words)
    assert f'"{report.best}"' in done.stdout


def test_search_command_with_a_wrong_request_writes_nothing(small_search: SearchRequest, tmp_path: Path) -> None:
    records = json.loads(small_search.file.read_text())
    unsafe = [record for record in records if not record["safe"]]
    (tmp_path / "unsafe.json").write_text(json.dumps(unsafe))
    (tmp_path / "one.json").write_text(json.dumps(unsafe[:1]))
    (tmp_path / "table.jsonl").write_text('{"question": "Why?", "answer": "So."}\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")

    def request(*options: object, **changes: object) -> list[object]:
        values = {"model": small_search.model, "file": small_search.file, "images": small_search.images}
        values |= {"out": tmp_path / "out"} | changes
        model, file, images, out = values.values()
        return [model, file, "--images", images, "--out", out, *options]

    for arguments, code, token in (
        (request("--words", "what,share,tell", "--budget", "11"), "out-of-range", "12"),
        (request("--budget", "5"), "out-of-range", "--budget"),
        (request("--words", "what", "--budget", "5"), "out-of-range", "6"),
        (request("--words", ""), "invalid-field", '""'),
        (request("--words", "what, "), "invalid-field", '" "'),
        (request("--words", "two words"), "invalid-field", '"two words"'),
        (request("--words", "what,control"), "invalid-field", "control"),
        (request("--goal", "brake"), None, 'did you mean "break"?'),
        (request("--judge", "llm"), None, "keyword, tiny_world"),
        (request("--judge", "tiny_world"), None, "world"),
        (request("--precision", "fp8"), None, "precision"),
        (request("--goal", "over-refuse", file=tmp_path / "unsafe.json"), None, '"safe"'),
        (request(file=tmp_path / "one.json"), "no-records", "one.json"),
        (request(file=tmp_path / "table.jsonl"), "unsupported-setting", "table.jsonl"),
        (request(file=tmp_path / "gone.json"), None, "gone.json"),
        (request(images=tmp_path), None, "image"),
        (request(model=tmp_path / "gone"), None, "gone"),
        (request(out=tmp_path / "full"), None, "manifest.json"),
        (request(out=small_search.file), None, str(small_search.file)),
    ):
        done = run_in_process("attack", "search", *arguments)
        assert done.returncode == 2, done.stderr
        assert code is None or error_code(done) == code, done.stderr
        assert token in " ".join(done.stderr.splitlines()[-1].split()), done.stderr
        assert not (tmp_path / "out").exists()
