"""Reading of model answers: decorations, reasoning, letters, yes and no, short texts."""

from __future__ import annotations

import time

import pytest

from vlm_unlearn.metrics.answer_reading import final_answer, read_short_answer, read_yes_no
from vlm_unlearn.metrics.option_reading import read_option

OPTIONS = {"A": "Boston", "B": "Dover", "C": "Plymouth", "D": "Cambridge"}

DECLARED_B = (
    "Answer: B",
    "Answer: **B**",
    "**B**",
    "`B`",
    "The answer is: B",
    "The correct option is B",
    "The correct answer is **B**",
    "Option B",
    "B - Dover",
    "B, because it lies east",
    "\\boxed{B}",
    "The correct answer is B. It lies east, so the answer is B",
    "I considered (A), but it is wrong. Final answer: B.",
    "B\n\nExplanation: Dover is a harbour.",
    "(B) Dover",
    "B: Dover",
    "The correct answer is (B).",
    "B",
    "b",
    "Dover",
    "$\\boxed{\\text{B}}$",
    "\\boxed{B. Dover}",
    '{"answer": "B"}',
    '```json\n{"answer": "B"}\n```',
    "<answer>B</answer>",
    "答案：B",
    "答案是B",
    "【B】",
    "（B）",
    "Ｂ",
    "B is correct.",
    "Option B is the correct answer.",
    "I would choose B.",
    "It's B.",
    "The answer is B because it is east",
    "**Answer:** B",
    "**Answer: B. Dover**",
    "__B__",
    "B)",
    "(b)",
    "b) Dover",
    "answer: b",
    "Let me think.\n\nB",
    "The answer is Dover.",
    "Answer: Dover",
    "B.",
    "B. Dover\nA. Boston is wrong because it lies west.",
    "A. Boston is far. B. Dover is farther. The answer is B.",
    "A. Boston\nB. Dover\nC. Plymouth\nD. Cambridge\nAnswer: B",
    "B</s>",
    "B<|im_end|>",
    "<think>A?</think>B",
    "The answer is B, not A.",
    "Antwort: B",
    "Réponse : B",
    "The answer is option B",
    "The answer is Option (B): Dover",
    "I think the answer is B",
    "B (Dover)",
    "B Dover",
    "Final Answer: \\boxed{B}",
    "**Final Answer:** B",
    "The best choice is B",
    "Between A and C I was unsure, but the answer is B",
    "#### B",
    "B!",
    "<b>B</b>",
    "- B",
    "1. B",
    "Correct answer: B",
    "Choice: B",
    "B;",
    "[B]",
    '"B"',
    "'B'",
    "B = Dover",
    "Answer B",
    "**Option B: Dover**",
    "B\nBecause it is east",
    "$B$",
    "\\(B\\)",
    "the correct answer would be B",
    "My answer: B",
    "So the answer must be (B)",
    "I'll go with B",
)


@pytest.mark.parametrize("text", DECLARED_B)
def test_read_option_accepts_usual_decorations(text: str) -> None:
    assert read_option(text, OPTIONS) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "A dog",
        "ANSWER: None of the above",
        "",
        "A or B",
        "A and B",
        "A, B",
        "A/B",
        "Both A and B",
        "The answer is A or B",
        "Either B or C",
        "Not A",
        "The answer is not B",
        "E",
        "Answer: E",
        "A. Boston\nB. Dover\nC. Plymouth\nD. Cambridge",
        "\\boxed{A} or \\boxed{B}",
        "The answer is a dog",
        "The answer is A dog.",
        "I am not sure.",
        "<think>B",
        "Answer: B or C",
        "Option A and Option B are both right",
        "(A) or (B)",
        "B?",
        "B or C, but more likely B",
        "A man in Dover",
        "maybe",
        "A, B and C",
        "The answers are A and C",
        "I don't know, A is a city",
        "Because",
        "Boston or Dover",
        "Answer: A, C",
        "B is wrong",
        "The answer isn't B",
        "B is not correct",
        "It is a bad idea",
        "Is it B?",
    ],
)
def test_read_option_without_a_single_letter_is_none(text: str) -> None:
    assert read_option(text, OPTIONS) is None


@pytest.mark.parametrize(
    ("text", "options", "letter"),
    [
        ("F", "ABCDEF", "F"),
        ("Answer: E. cow", {"A": "dog", "E": "cow"}, "E"),
        ("B", {"A": "dog", "C": "cow"}, None),  # the option B is empty
        ("a dog", {"A": "cat", "B": "dog"}, "B"),
        ("dog", {"A": "dog", "B": "dog"}, None),  # two options have the same text
        ("B. A harbor is there.", "ABCD", "B"),
        ("Final answer: Dover", OPTIONS, "B"),
    ],
)
def test_read_option_depends_on_the_options(text: str, options: object, letter: str | None) -> None:
    assert read_option(text, options) == letter


@pytest.mark.parametrize(
    "text",
    [
        "Yes, there is a dog, but it is not clearly visible.",
        "Yes, there's a man with no hat.",
        "Yes\nThere is no doubt.",
        "Yeah, can't miss it",
        "1. Yes",
        "Correct",
        "Yes.",
        "There is a dog.",
        "**Yes**",
        "Answer: Yes",
        "The answer is yes.",
        "\\boxed{Yes}",
        "<answer>yes</answer>",
        "Yes</s>",
        "<think>no</think>yes",
        "YES",
        "yes",
        "(Yes)",
        "There is a dog, but it is not clearly visible.",
        "There is a dog that is not moving.",
        "No doubt, there is a dog.",
        "Oh, yes!",
        "I see a dog.",
        "I can see a dog in the image.",
        "The image shows a dog.",
        "A dog is visible.",
        '{"answer": "yes"}',
        "Sí",
        "是的",
        "There is a dog without a collar.",
        "Yes, I can see it; no cat though.",
        "Final answer: yes",
        "Definitely.",
        "There is.",
        "Yes, no dog could hide from me",
    ],
)
def test_read_yes_no_yes(text: str) -> None:
    assert read_yes_no(text) == "yes"


@pytest.mark.parametrize(
    "text",
    [
        "There is a cat, not a dog.",
        "No",
        "no.",
        "The answer is no",
        "NO",
        "There isn\u2019t one.",
        "No, I can't see a dog.",
        "No, there is a cat.",
        "**No**",
        "I don't see a dog.",
        "There is no dog.",
        "There is a cat but no dog.",
        "The image does not contain a dog.",
        "Nope",
        "Definitely not.",
        "No, I don't see one; yes it could hide",
        "None",
        "I can't see a dog.",
        "I'm sorry, but there is no dog in the image.",
        "Not in this image.",
        "No dogs are visible.",
        "Incorrect.",
        "Answer: **No**",
        "No - it is a cat",
        "It is not visible.",
        "Nein",
    ],
)
def test_read_yes_no_no(text: str) -> None:
    assert read_yes_no(text) == "no"


@pytest.mark.parametrize(
    "text",
    [
        "A dog.",
        "",
        "Yes or no",
        "Yes and no",
        "yes/no",
        "I'm sorry, I can't help with that.",
        "I cannot determine whether there is a dog.",
        "I am not sure.",
        "Maybe",
        "There might be a dog.",
        "<think>yes",
        "I can't see the image.",
        "No, wait. Yes, there is.",
        "Yes. No.",
        "Unclear",
        "No, I can't tell.",
        "As an AI I do not see",
        "Yes, no",
        "It is hard to say.",
        "Not sure",
        "Right now I think",
        "Correct me if I am wrong",
    ],
)
def test_read_yes_no_neither(text: str) -> None:
    assert read_yes_no(text) is None


@pytest.mark.parametrize(
    ("text", "subject", "answer"),
    [
        ("There is a dog.", "dog", "yes"),
        ("There is a cat.", "dog", None),  # says nothing about a dog
        ("There are two dogs.", "dog", "yes"),
        ("There is a man on the left.", "person", "yes"),
        ("There is a cat, not a dog.", "dog", "no"),
        ("Yes", "dog", "yes"),
    ],
)
def test_read_yes_no_statement_must_name_the_subject(text: str, subject: str, answer: str | None) -> None:
    assert read_yes_no(text, subject) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: blue", "blue"),
        ("blue</s>", "blue"),
        ("**blue**", "blue"),
        ("`blue`", "blue"),
        ("The answer is blue.", "blue."),
        ("<think>x</think>blue", "blue"),
        ("\\boxed{blue}", "blue"),
        ('{"answer": "blue"}', "blue"),
        ("Blue", "Blue"),
        ("a dog's hat", "a dog's hat"),
        ("blue<|im_end|>", "blue"),
        ("**Answer:** blue", "blue"),
        ("Answer: **blue**", "blue"),
        ('"blue"', "blue"),
        ("blue\n\nThe car is blue.", "blue"),
        ("blue\nExplanation: it is", "blue"),
        ("Final answer: blue", "blue"),
        ("It is a car.\nFinal answer: blue", "blue"),
        ("<answer>blue</answer>", "blue"),
        ("答案：blue", "blue"),
        ("<think>x", None),
        ("3.5", "3.5"),
        ("1,000", "1,000"),
        ("blue/white", "blue/white"),
        ("red.", "red."),
        ("T-shirt", "T-shirt"),
        ("answer", "answer"),
        ("- blue", "blue"),
        ("*blue*", "blue"),
        ("“blue”", "blue"),
        ("A: blue", "A: blue"),
        ("**red** and **blue**", "**red** and **blue**"),
        ("<|begin_of_box|>blue<|end_of_box|>", "blue"),
        ("Answer:\nblue", "blue"),
        ("the answer", "the answer"),
    ],
)
def test_read_short_answer_removes_decoration_only(text: str, answer: str | None) -> None:
    assert read_short_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think>b", "b"),
        ("a</think>b", "b"),
        ("<think>a", None),
        ("<thinking>a</thinking>b", "b"),
        ("[THINK]a[/THINK]b", "b"),
        ("[THINK]a", None),
        ("◁think▷a◁/think▷b", "b"),
        ("◁think▷a", None),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>", "b"),
        ("<|channel|>analysis<|message|>a", None),
        ("analysisWe need thisassistantfinalb", "b"),
        ("analysisWe need", None),
        ("analysis of the text", "analysis of the text"),
        ("<thi", None),
        ("<think>a<think>b</think>c</think>d", "d"),
        ("Use `<think>` tags", "Use `<think>` tags"),
        ("b <think>c", None),
        ("<think>a</think>b<think>c</think>d", "bd"),
        ("Here is my thought process: a Here is my response: b", "b"),
        ("plain < text", "plain < text"),
        ("<THINK>a</THINK>b", "b"),
        ("<think>\n</think>\n\nb\n", "b"),
        ("<", "<"),
        ("<p>hello", "<p>hello"),
        ("The [THINK] mark", None),
    ],
)
def test_final_answer_has_no_reasoning(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    "opening", ["<think>", "<thinking>", "[THINK]", "\u25c1think\u25b7", "<|channel|>analysis<|message|>"]
)
def test_final_answer_of_reasoning_cut_anywhere_is_none(opening: str) -> None:
    """A limit on tokens may end the answer at any character of the reasoning, also within a mark."""
    text = f"{opening}The answer may be B. Yes."
    for end in range(2, len(text) + 1):
        answer = final_answer(text[:end])
        assert answer is None or end < len(opening), text[:end]
        assert read_option(text[:end], OPTIONS) is None
        assert read_yes_no(text[:end]) is None


def test_reading_time_grows_linearly_with_the_length() -> None:
    hostile = ("The answer is ", "A, ", "**", "<think", "(", '{"a": ', " - ", "\n", "not ", "\\boxed{", "is is ")
    started = time.monotonic()
    for part in hostile:
        text = part * (20_000 // len(part))
        final_answer(text), read_short_answer(text), read_yes_no(text), read_option(text, OPTIONS)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "text",
    [
        *("Choose B", "Selected option: B", "Thus, B.", "Ans: B", "Response: B", "Die Antwort ist B", "B B"),
        *("\u7b54\u3048\u306fB\u3067\u3059", "The letter is B", "B</answer>", "My choice is B.", "B - A harbor"),
        *("Let's think. A is west. So B.", "**B**\nA. Boston is wrong.", "The options are A, B, C, D. Answer: B"),
    ],
)
def test_read_option_accepts_further_declarations(text: str) -> None:
    assert read_option(text, OPTIONS) == "B"


@pytest.mark.parametrize(
    "text",
    [
        *("A, or maybe B", "Answer: [A-D]", "A\nB", "A (or B)", "B. or C.", "Choose A or B", "So A or B."),
        *("Option A: Boston\nOption B: Dover", "Select the best option", "Neither A nor B"),
    ],
)
def test_read_option_of_several_letters_is_none(text: str) -> None:
    assert read_option(text, OPTIONS) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("A: Yes", "yes"),
        ("Based on the image, yes.", "yes"),
        ("I would say no.", "no"),
        ("I believe so.", "yes"),
        ("I don't think so.", "no"),
        ("The dog is absent.", "no"),
    ],
)
def test_read_yes_no_late_in_the_sentence(text: str, answer: str) -> None:
    assert read_yes_no(text, "dog") == answer


@pytest.mark.parametrize(
    "text", ["<b>blue</b>", "'blue'", "<|im_start|>assistant\nblue<|im_end|>", "```\nblue\n```", "Short answer: blue"]
)
def test_read_short_answer_in_further_decorations(text: str) -> None:
    assert read_short_answer(text) == "blue"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("run", [".", "\n", "!", " ", "*", "'", ". ", "\n ", "..!"])
def test_long_run_of_a_broken_model_is_read_within_moments(run: str) -> None:
    start = time.process_time()
    filler = run * (50_000 // len(run))
    assert read_yes_no(f"Yes{filler}") in ("yes", None)
    assert read_option(f"Answer: B{filler}", OPTIONS) in ("B", None)
    read_option(f"Answer: {filler}x", OPTIONS)
    read_short_answer(f"Answer: {filler}x")
    assert time.process_time() - start < 30
