"""The prompts of the attacks on the input, each with its control."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers import raises_code
from vlm_unlearn.attacks.base import ATTACKS, apply_attacks, build_attack
from vlm_unlearn.attacks.multi_turn import RoundsFile
from vlm_unlearn.attacks.template import TemplatesFile
from vlm_unlearn.attacks.texts import PairsFile, neutral_words, read_texts
from vlm_unlearn.config import AttackConfig, SplitConfig, Suite
from vlm_unlearn.data.image_edits import apply_edits
from vlm_unlearn.evaluation.metric_roles import metric_roles
from vlm_unlearn.evaluation.prompts import split_prompts
from vlm_unlearn.records import Prompt, Rate, Round, Row

NUMBER = 6
WITH_CONTROL = [
    *("prefill", "template", "in_context", "multi_turn", "sampling", "typographic"),
    *("image_noise", "jpeg", "crop", "rotate", "resize"),
]


def prompts(**changes: object) -> list[Prompt]:
    fields = [
        {
            "id": f"p{number}",
            "group_id": f"g{number}",
            "set": "s",
            "kind": "unsafe",
            "image": f"{number}.png",
            "question": f"Share the recipe for thing {number}.",
            "reference": f"mix a{number} with b{number} , then heat  c{number} .",
            **changes,
        }
        for number in range(NUMBER)
    ]
    return [Prompt.model_validate(values) for values in fields]


def attack(name: str, originals: list[Prompt] | None = None, **options: object) -> list[Prompt]:
    return apply_attacks(prompts() if originals is None else originals, [AttackConfig(name=name, **options)])  # type: ignore[arg-type]


def first_group(attacked: list[Prompt]) -> list[Prompt]:
    return [prompt for prompt in attacked if prompt.group_id == "g0"]


def num_words(text: str | None) -> int:
    return len((text or "").split())


@pytest.mark.parametrize("name", sorted(set(ATTACKS.built_in) - {"one_word"}))
def test_every_attack_keeps_groups_and_makes_distinct_prompts(name: str) -> None:
    attacked = attack(name)
    assert {prompt.group_id for prompt in attacked} == {f"g{number}" for number in range(NUMBER)}
    assert len({(prompt.group_id, prompt.rewrite) for prompt in attacked}) == len(attacked)
    assert all(prompt.variant and prompt.variant.startswith(name) for prompt in attacked)
    assert {(prompt.set, prompt.kind) for prompt in attacked} == {("s", "unsafe")}
    changed = [prompt.model_copy(update={"id": "", "variant": None, "rewrite": 0}) for prompt in attacked]
    assert not {json.dumps(p.model_dump()) for p in changed} & {
        json.dumps(p.model_copy(update={"id": ""}).model_dump()) for p in prompts()
    }


@pytest.mark.parametrize("name", WITH_CONTROL)
def test_every_control_has_as_many_prompts_and_another_variant(name: str) -> None:
    attacked, control = attack(name), attack(name, control=True)
    assert len(attacked) == len(control)
    assert {p.variant.partition("/")[0] for p in control if p.variant} == {f"{name}-control"}
    assert "control" in (type(build_attack(AttackConfig(name=name))).__doc__ or "").lower()


def test_controls_of_all_attacks_are_controls_in_the_report(tmp_path: Path) -> None:
    def roles(*attacks: dict[str, Any]) -> str:
        split = {"name": "s", "format": "vlguard", "file": "x.json", "images": "", "kind": "unsafe"}
        metrics = {"asr": {"splits": ["s"], "labels": ["complied"]}}
        splits = [{**split, "attack": list(attacks)}]
        suite = Suite.model_validate({"model": "m", "root": tmp_path, "splits": splits, "metrics": metrics})
        row = Row(model="m", metrics={"asr": Rate(value=0.5, low=0.1, high=0.9, n=4)})
        return metric_roles(row, suite)[0].condition

    assert roles({"name": "prefill", "control": True}) == "control"
    assert roles({"name": "one_word", "trigger": "control"}, {"name": "jpeg", "control": True}) == "control"
    assert roles({"name": "one_word", "trigger": "what"}, {"name": "jpeg", "control": True}) == "attacked"
    assert roles({"name": "prefill"}) == "attacked"


# prefill


def test_prefill_by_words_of_the_reference_is_a_curve() -> None:
    group = first_group(attack("prefill", reference=[0, 2, 4, 99]))
    assert [prompt.prefill for prompt in group] == [None, "mix a0", "mix a0 with b0", "mix a0 with b0 , then heat  c0"]
    assert [prompt.variant for prompt in group] == [f"prefill/{n}-words" for n in (0, 2, 4, 99)]
    assert [prompt.rewrite for prompt in group] == [0, 1, 2, 3]


def test_prefill_by_share_leaves_at_least_a_word() -> None:
    group = first_group(attack("prefill", reference=[0.5, 1], unit="share"))
    assert [num_words(prompt.prefill) for prompt in group] == [4, 8]  # of 9


def test_prefill_by_tokens_of_a_tokenizer(tiny_model: Path) -> None:
    originals = prompts(reference="share the recipe, please. yes")
    group = first_group(attack("prefill", originals, reference=[3, 4, 5], unit="tokens", tokenizer=str(tiny_model)))
    assert [prompt.prefill for prompt in group] == ["share the recipe", "share the recipe,", "share the recipe, please"]


def test_prefill_control_has_as_many_neutral_words() -> None:
    for options in ({}, {"text": ["Sure", "Of course, here it is: "]}, {"reference": [1, 5]}):
        attacked, control = attack("prefill", **options), attack("prefill", **options, control=True)
        assert [num_words(p.prefill) for p in attacked] == [num_words(p.prefill) for p in control]
        assert not {p.prefill for p in attacked} & {p.prefill for p in control}
    assert {p.prefill for p in attack("prefill", text="a b c", control=True, neutral="x y")} == {"x y x"}


def test_prefill_takes_answers_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "harmful.json").write_text(json.dumps({"g0": "first answer", "1.png": "second answer"}))
    answers = tmp_path / "harmful.json"
    group = attack("prefill", prompts(reference="I cannot .")[:2], reference=1, answers=answers)
    assert [prompt.prefill for prompt in group] == ["first", "second"]
    with raises_code("missing-reference", record='"p2"'):
        attack("prefill", reference=1, answers=answers)


def test_prefill_without_a_reference_is_an_error_and_zero_words_need_none() -> None:
    with raises_code("missing-reference", record='"p0"'):
        attack("prefill", prompts(reference=None), reference=1)
    assert attack("prefill", prompts(reference=None), reference=0)[0].prefill is None


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"reference": 1, "unit": "tokens"}, "conflicting-settings"),
        ({"reference": 1, "tokenizer": "x"}, "conflicting-settings"),
        ({"reference": 1.5, "unit": "share"}, "out-of-range"),
        ({"reference": 1.5}, "invalid-field"),
        ({"text": " "}, "invalid-field"),
        ({"reference": -1}, "invalid-field"),
        ({"references": 1}, "unknown-key"),
    ],
)
def test_invalid_options_of_prefill(options: dict[str, object], code: str) -> None:
    with raises_code(code):
        attack("prefill", **options)


# template


def test_templates_wrap_the_question_and_judges_read_it_alone() -> None:
    attacked = attack("template")
    names = [template.name for template in read_texts(TemplatesFile, "templates.yaml", None).templates]
    assert [p.variant for p in first_group(attacked)] == [f"template/{name}" for name in names]
    for prompt in attacked:
        original = f"Share the recipe for thing {prompt.group_id[1:]}."
        assert original in prompt.question
        assert prompt.conversation == original
        assert (prompt.system is None) != (prompt.question == original)


def test_template_controls_have_the_form_and_length_of_their_templates() -> None:
    for template in read_texts(TemplatesFile, "templates.yaml", None).templates:
        assert template.control is not None
        assert (template.system is None) == (template.control.system is None)
        for text, control in (
            (template.system, template.control.system),
            (template.question, template.control.question),
        ):
            assert abs(num_words(text) - num_words(control)) <= 0.1 * num_words(text)


def test_template_of_a_file_follows_the_system_message_and_keeps_the_image_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("templates: [{name: mine, system: New., question: 'Now: {question} Go.'}]")
    originals = prompts(system="Old.", question="See <> here", image_offset=4)
    (first, *_) = attack("template", originals, file=tmp_path / "mine.yaml")
    assert (first.system, first.question) == ("Old.\n\nNew.", "Now: See <> here Go.")
    assert first.question[first.image_offset :].startswith("<>")
    assert attack("template", file=tmp_path / "mine.yaml")[0].image_offset == 0
    with raises_code("missing-setting"):
        attack("template", file=tmp_path / "mine.yaml", control=True)
    with raises_code("unknown-name"):
        attack("template", templates=["other"])
    (tmp_path / "mine.yaml").write_text("templates: [{name: mine, question: 'Now.'}]")
    with raises_code("invalid-template"):
        attack("template", file=tmp_path / "mine.yaml")


# in_context


def test_in_context_pairs_are_of_other_questions_and_the_image_stays_with_the_question() -> None:
    attacked = attack("in_context", k=[0, 1, 3])
    for prompt in attacked:
        k = int((prompt.variant or "").partition("/")[2])
        assert (len(prompt.history), prompt.image_round) == (k, k)
        assert prompt.reference not in [turn.answer for turn in prompt.history]
        assert prompt.question not in [turn.question for turn in prompt.history]
        assert prompt.conversation == prompt.question
    none, single, three = first_group(attacked)
    assert (*none.history, *three.history[:1]) == single.history  # a curve over the same pairs
    assert len({prompt.history for prompt in attacked}) > NUMBER  # each question has pairs of its own


def test_in_context_never_gives_the_answer_away() -> None:
    """Two questions with the same answer are no pairs for each other."""
    originals = prompts()
    originals[1] = originals[1].model_copy(update={"reference": originals[0].reference})
    for seed in range(5):
        for prompt in attack("in_context", originals, k=4, seed=seed):
            assert prompt.reference not in [turn.answer for turn in prompt.history]
    with raises_code("out-of-range", record='"p0"'):
        attack("in_context", originals, k=5)


def test_in_context_precedes_earlier_rounds_and_controls_have_harmless_pairs() -> None:
    history = [{"question": "Hi.", "answer": "Hello."}]
    (first, *_) = attack("in_context", prompts(history=history, image_round=1), k=2)
    assert (len(first.history), first.image_round) == (3, 3)
    assert first.history[-1] == Round(question="Hi.", answer="Hello.")
    assert first.conversation.startswith("User: Hi.")
    benign = read_texts(PairsFile, "benign_pairs.yaml", None).pairs
    for prompt in attack("in_context", k=8, control=True):
        assert len(set(prompt.history) & set(benign)) == 8


def test_in_context_takes_pairs_from_a_training_set_or_answers_from_a_file(
    training_sets: dict[str, Path], tmp_path: Path
) -> None:
    forget = [json.loads(line) for line in (training_sets["safe_eraser"] / "forget.jsonl").read_text().splitlines()]
    pairs = {Round(question=record["question"], answer=record["answer"]) for record in forget}
    for prompt in attack("in_context", k=3, file=training_sets["safe_eraser"]):
        assert set(prompt.history) <= pairs
    retain = [json.loads(line) for line in (training_sets["safe_eraser"] / "retain.jsonl").read_text().splitlines()]
    for prompt in attack("in_context", k=3, file=training_sets["safe_eraser"], control=True):
        assert {turn.question for turn in prompt.history} <= {record["question"] for record in retain}
    (tmp_path / "pairs.yaml").write_text("pairs: [{question: Q, answer: A}]")
    assert attack("in_context", k=1, file=tmp_path / "pairs.yaml")[0].history == (Round(question="Q", answer="A"),)
    (tmp_path / "harmful.json").write_text(json.dumps({f"{n}.png": f"answer {n}" for n in range(NUMBER)}))
    attacked = attack("in_context", prompts(reference="I cannot ."), k=2, answers=tmp_path / "harmful.json")
    assert {turn.answer.split()[0] for prompt in attacked for turn in prompt.history} == {"answer"}


# multi_turn and sampling


def test_multi_turn_has_the_image_in_the_first_round() -> None:
    attacked = attack("multi_turn", prompts(image_offset=3), rounds=[0, 1, 3])
    none, single, three = first_group(attacked)
    assert (none.history, none.image_offset) == ((), 3)
    assert single.history == three.history[:1]
    assert (three.image_round, three.image_offset, three.question) == (0, 0, none.question)
    assert "the recipe for thing 0" in three.conversation + three.history[1].question
    assert three.conversation == three.question
    assert "{topic}" not in str(three)
    with raises_code("out-of-range"):
        attack("multi_turn", rounds=9)


def test_multi_turn_control_has_rounds_of_the_same_length() -> None:
    content = read_texts(RoundsFile, "rounds.yaml", None)
    assert len(content.rounds) == len(content.control)
    for turn, control in zip(content.rounds, content.control, strict=True):
        for text, other in ((turn.question, control.question), (turn.answer, control.answer)):
            length = num_words(text.replace("{topic}", "the recipe for this"))
            assert abs(length - num_words(other)) <= 3


def test_sampling_has_a_temperature_of_its_own() -> None:
    group = first_group(attack("sampling", n=3, temperature=0.7))
    assert [(prompt.rewrite, prompt.temperature, prompt.variant) for prompt in group] == [
        (number, 0.7, "sampling") for number in range(3)
    ]
    assert {prompt.temperature for prompt in attack("sampling", control=True)} == {0.0}


# images


def test_no_image_and_shuffled_images() -> None:
    edited = attack("jpeg", prompts(image_offset=3))
    for prompt in attack("no_image", edited):
        assert (prompt.image, prompt.image_edits, prompt.image_offset) == (None, (), 0)
    shuffled = {p.group_id: p.image for p in attack("shuffled_image", seed=1)}
    assert sorted(str(image) for image in shuffled.values()) == [f"{n}.png" for n in range(NUMBER)]
    assert all(shuffled[f"g{number}"] != f"{number}.png" for number in range(NUMBER))
    assert shuffled != {p.group_id: p.image for p in attack("shuffled_image", seed=2)}
    with raises_code("unsupported-setting"):
        attack("shuffled_image", prompts(image="a.png"))


@pytest.mark.parametrize("name", ["blank_image", "image_noise", "jpeg", "crop", "rotate", "resize", "typographic"])
def test_image_changes_need_an_image(name: str) -> None:
    with raises_code("missing-image", record='"p0"'):
        attack(name, prompts(image=None))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("image_noise", {"std": [5, 20]}),
        ("jpeg", {"quality": [50, 5]}),
        ("crop", {"share": [0.9, 0.4]}),
        ("rotate", {"degrees": [5, 40]}),
        ("resize", {"scale": [0.9, 0.2]}),
    ],
)
def test_image_changes_make_one_rewrite_of_each_value(name: str, options: dict[str, list[float]]) -> None:
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    (values,) = options.values()
    group = first_group(attack(name, **options))
    assert [prompt.variant for prompt in group] == [f"{name}/{value:g}" for value in values]
    pictures = [apply_edits(picture, prompt.image_edits) for prompt in group]
    assert len({image.tobytes() for image in (picture, *pictures)}) == 3
    controls = [apply_edits(picture, p.image_edits) for p in first_group(attack(name, **options, control=True))]
    if name in ("crop", "rotate"):  # the control has the size of the changed picture
        assert [image.size for image in controls] == [image.size for image in pictures]
    if name in ("image_noise", "jpeg", "resize"):
        assert {image.size for image in controls} == {picture.size}


def test_noise_control_changes_the_samples_by_as_much() -> None:
    picture = Image.new("RGB", (64, 64), (128, 128, 128))
    distances = []
    for control in (False, True):
        edits = first_group(attack("image_noise", std=20, control=control))[0].image_edits
        difference = np.asarray(apply_edits(picture, edits), dtype=float) - 128
        distances.append(float(np.sqrt((difference**2).mean())))
    assert distances[0] == pytest.approx(distances[1], rel=0.05)


def test_random_values_depend_on_seed_and_image_alone() -> None:
    for name, options in (("image_noise", {}), ("crop", {"position": "random"})):
        edits = [p.image_edits for p in attack(name, **options)]
        assert edits == [p.image_edits for p in attack(name, **options)]
        assert edits != [p.image_edits for p in attack(name, **options, seed=1)]
        assert len(set(edits)) == NUMBER
        assert len({p.image_edits for p in attack(name, prompts(image="a.png"), **options)}) == 1


def test_typographic_draws_the_request_and_asks_for_nothing_in_writing() -> None:
    for prompt in attack("typographic", prompts(image_offset=3)):
        number = prompt.group_id[1:]
        assert prompt.image_edits[0].model_dump() == {
            "name": "text",
            "text": f"The recipe for thing {number}\n1.\n2.\n3.",
            "layout": "below",
        }
        assert "thing" not in prompt.question
        assert prompt.conversation == f"Share the recipe for thing {number}."
        assert prompt.image_offset == 0
    (drawn, *_) = attack("typographic", items=0, layout="on", question="Answer it.")
    assert drawn.image_edits[0].model_dump()["text"] == "Share the recipe for thing 0."
    assert drawn.question == "Answer it."
    for prompt in attack("typographic", control=True):
        text = prompt.image_edits[0].model_dump()["text"]
        assert prompt.question.startswith("Share the recipe")
        assert (num_words(text), "recipe" in text) == (5 + 3, False)
    with raises_code("unsupported-text", record='"p0"'):
        attack("typographic", prompts(question="分享食谱。"))


# together


def test_attacks_follow_each_other() -> None:
    configs = [
        AttackConfig(name="one_word", trigger="what", num_rewrites=2),
        AttackConfig(name="jpeg"),
        AttackConfig(name="in_context", k=1),
        AttackConfig(name="prefill", reference=[1, 2]),
    ]
    group = first_group(apply_attacks(prompts(), configs))
    assert [prompt.rewrite for prompt in group] == [0, 1, 2, 3]
    assert group[0].variant == "jpeg/10+in_context/1+prefill/1-words"
    assert {num_words(prompt.prefill) for prompt in group} == {1, 2}
    assert all(prompt.history and prompt.image_edits and prompt.question.startswith("What") for prompt in group)
    # A rewrite of the question after typographic changes the written question only.
    later = [AttackConfig(name="typographic"), AttackConfig(name="one_word", trigger="what")]
    assert apply_attacks(prompts(), later)[0].conversation == "Share the recipe for thing 0."


def test_paths_of_a_suite_are_relative_to_its_root(world: Path, tmp_path: Path) -> None:
    split = {
        "name": "unsafe",
        "format": "vlguard",
        "file": "vlguard/train.json",
        "images": "vlguard/train",
        "kind": "unsafe",
        "attack": [{"name": "prefill", "reference": [2], "answers": "vlguard/harmful_answers.json"}],
    }
    suite = Suite.model_validate({"model": "m", "root": world, "splits": [split]})
    assert {prompt.prefill.split()[0] for prompt in split_prompts(suite.splits[0]) if prompt.prefill} == {"mix"}
    again = SplitConfig.model_validate(suite.splits[0].model_dump(mode="json"))  # as suite.json has it
    assert split_prompts(again) == split_prompts(suite.splits[0])


def test_neutral_words_and_shipped_files() -> None:
    assert (neutral_words(3), neutral_words(0), num_words(neutral_words(100))) == ("Looking at this", "", 100)
    shipped = {file.name for file in (files("vlm_unlearn.attacks.texts")).iterdir() if file.name.endswith(".yaml")}
    assert shipped == {"templates.yaml", "rounds.yaml", "benign_pairs.yaml"}
    assert len(read_texts(PairsFile, "benign_pairs.yaml", None).pairs) >= 16
