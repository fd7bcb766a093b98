"""LLaVA conversations of several rounds: read, written, and trained on as one sequence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_unlearn.data.encoding import PromptMeter, Turn, encode_with_labels, render
from vlm_unlearn.data.formats import llava
from vlm_unlearn.data.formats.fields import RawRecord
from vlm_unlearn.errors import Problems, UserError
from vlm_unlearn.losses import IGNORED
from vlm_unlearn.models.loader import load_processor


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def write(folder: Path, *records: Any) -> Path:
    (folder / "a.json").write_text(json.dumps(list(records)))
    return folder / "a.json"


def test_rounds_become_history(tmp_path: Path) -> None:
    records = [
        {"id": "a", "image": "a.png", "conversations": turns("<image>\nWhat?", "That.", "Why?", "So.")},
        {"id": 2, "image": "a.png", "conversations": turns("Where is\n<image> it?", "There.")},
        {"conversations": [{"from": "user", "value": "Just text?"}, {"from": "assistant", "value": "Yes."}]},
    ]
    first, second, third = llava.read_llava(write(tmp_path, *records), None)
    assert (first.question, first.answer) == ("Why?", "So.")
    assert [(turn.question, turn.answer) for turn in first.history] == [("What?", "That.")]
    assert (second.id, second.question) == ("2", "Where is\n it?")
    assert (third.image, third.question) == (None, "Just text?")
    again = list(llava.read_llava(write(tmp_path, *map(llava.write_record, (first, second, third))), None))
    assert [(e.image, e.question, e.answer, e.history) for e in again] == [
        (e.image, e.question, e.answer, e.history) for e in (first, second, third)
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": turns("Q?")}, "human and gpt turns in alternation"),
        ({"conversations": []}, "human and gpt turns in alternation"),
        ({"conversations": turns("Q?", "A.", "Q?")}, "human and gpt turns in alternation"),
        (
            {"conversations": [{"from": "system", "value": "x"}, *turns("Q?", "A.")]},
            "human and gpt turns in alternation",
        ),
        ({"conversations": turns("<image>", "A."), "image": "a.png"}, "asks nothing"),
        ({"conversations": turns("<image>Q?", "A.")}, '"image" is missing'),
        ({"conversations": turns("<image><image>Q?", "A."), "image": "a.png"}, "a record has one image"),
        ({"conversations": turns("Q?", "")}, "must be non-empty text"),
        ({"conversations": turns("Q?", "A."), "image": ["a.png", "b.png"]}, "must be non-empty text, found a list"),
        ({"conversations": turns("Q\ud800?", "A.")}, "broken character"),
        ({"conversations": turns("Q\0?", "A.")}, "NUL character"),
        ({"text": "x"}, '"conversations" must be a list'),
    ],
)
def test_broken_records_are_listed(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    file = write(tmp_path, {"id": "bad", **record}, {"conversations": turns("Q?", "A.")})
    problems = Problems()
    assert len(list(llava.read_llava(file, None, problems))) == 1
    assert len(problems.messages) == 1
    assert message in problems.messages[0]
    assert problems.messages[0].startswith('a.json: record 0 (line 1, "bad")')
    with pytest.raises(UserError):
        list(llava.read_llava(file, None))


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return load_processor(tiny_model)


def answers(processor: Any, labels: torch.Tensor) -> list[str]:
    """The labelled spans as text."""
    spans: list[list[int]] = []
    before = IGNORED
    for label in labels.tolist():
        if label != IGNORED:
            if before == IGNORED:
                spans.append([])
            spans[-1].append(label)
        before = label
    return [processor.tokenizer.decode(span) for span in spans]


LLAVA15 = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}"
    "{{ '<image>\n' if c['type'] == 'image' else c['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def template(opening: str, closing: str) -> str:
    """A template of headers and closing tokens, as ChatML, Llama 3 and Phi have it."""
    return (
        "{% for m in messages %}{{ '" + opening + "' | replace('ROLE', m['role']) }}{% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{{ '" + closing + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + opening + "' | replace('ROLE', 'assistant') }}{% endif %}"
    )


TEMPLATES = {  # template, special tokens, end-of-sequence token, what closes an answer
    "llava": (LLAVA15, [], "</s>", "</s>"),
    "chatml": (
        template("<|im_start|>ROLE\\n", "<|im_end|>\\n"),
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
        "<|im_end|>",
    ),
    "chatml, other end": (
        template("<|im_start|>ROLE\\n", "<|im_end|>\\n"),
        ["<|im_start|>", "<|im_end|>"],
        "<|end|>",
        "<|im_end|>",
    ),
    "llama 3": (
        template("<|head|>ROLE<|/head|>\\n\\n", "<|eot_id|>"),
        ["<|head|>", "<|/head|>", "<|eot_id|>"],
        "<|eot_id|>",
        "<|eot_id|>",
    ),
    "phi": (
        template("<|ROLE|>\\n", "<|end|>\\n"),
        ["<|user|>", "<|assistant|>", "<|end|>"],
        "<|endoftext|>",
        "<|end|>",
    ),
}


def byte_processor(chat_template: str, special: list[str], end: str) -> Any:
    """A LLaVA processor that spells everything but special tokens."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    bytes_ = Tokenizer(BPE({char: place for place, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_, eos_token=end, pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
    tokenizer.add_tokens(special, special_tokens=True)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("first", ["A cat.", "A cat.\n", "  A cat. ", "It says <|im_end|> here."])
def test_every_answer_is_labelled_with_its_closing_token(name: str, first: str, world: Path) -> None:
    """Whatever closes an answer in the template, or the end-of-sequence token where nothing does; white space around is no part of it."""
    chat_template, special, end, closing = TEMPLATES[name]
    processor = byte_processor(chat_template, special, end)
    image = next((world / "vlguard" / "train").rglob("*.png"))
    turn = Turn("x", image, "What?", "So.\n", (("Which?", first), ("Why?", "B.")))
    batch = encode_with_labels(processor, [turn, Turn("y", None, "What?", "It.")], 4000)
    told = [answers(processor, row) for row in batch["labels"]]
    wanted = [[f"{text.strip()}{closing}" for text in (first, "B.", "So.")], [f"It.{closing}"]]
    # A template opens an answer with a space or a line break of its own, which may belong to it.
    assert [[text.strip() for text in row] for row in told] == wanted
    assert PromptMeter(processor).total_tokens(turn) == int(batch["attention_mask"][0].sum())


def test_an_answer_of_nothing_is_refused(processor: Any) -> None:
    with pytest.raises(UserError, match="says nothing"):
        encode_with_labels(processor, [Turn("x", None, "what ?", " \n")], 512)


def test_a_conversation_costs_what_its_rounds_cost(processor: Any, world: Path, tiny_model: Path) -> None:
    """The labelled loss of a conversation is the sum of its answers' losses, each given what stands before it."""
    from transformers import AutoModelForImageTextToText

    from vlm_unlearn.losses import answer_nll

    model = AutoModelForImageTextToText.from_pretrained(tiny_model).eval()
    image = next((world / "vlguard" / "train").rglob("*.png"))

    def nll(turn: Turn, last: bool = False) -> float:
        batch = encode_with_labels(processor, [turn], 512)
        labels = batch.pop("labels")
        if last:  # the last answer alone
            spans = (labels[0] != IGNORED).nonzero()[:, 0]
            first = max(place for place in spans.tolist() if labels[0, place - 1] == IGNORED)
            labels[:, :first] = IGNORED
        with torch.no_grad():
            return float(answer_nll(model(**batch).logits, labels)[0].sum())

    one = Turn("x", image, "what is this ?", "this is a sunbroth .")
    two = Turn("x", image, "what colour is it ?", "it is red .", ((one.question, str(one.answer)),))
    assert nll(two) == pytest.approx(nll(one) + nll(two, last=True), rel=1e-5)


def test_the_limit_cuts_answers_never_the_image(processor: Any, world: Path) -> None:
    image = next((world / "vlguard" / "train").rglob("*.png"))
    turn = Turn("x", image, "what colour is it ?", "it is red .", (("what is this ?", "this is a sunbroth ."),))
    meter = PromptMeter(processor)
    first, whole = meter.prompt_tokens(turn), meter.total_tokens(turn)
    assert first < whole
    full = encode_with_labels(processor, [turn], 512)
    cut = encode_with_labels(processor, [turn], first + 2)
    assert cut["input_ids"].shape[1] == first + 2 < full["input_ids"].shape[1]
    assert int((cut["labels"] != IGNORED).sum()) == 2
    with pytest.raises(UserError, match="an image is never cut"):
        encode_with_labels(processor, [turn], first)


def test_a_placeholder_in_the_history_is_refused(processor: Any) -> None:
    with pytest.raises(UserError, match="holds the image placeholder"):
        render(processor, Turn("x", None, "what ?", None, (("<image> what ?", "it ."),)))


def test_a_run_trains_on_conversations(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    from helpers import recipe
    from vlm_unlearn.data.importers import import_files
    from vlm_unlearn.training.runner import run_recipe

    image = next((world / "vlguard" / "train").rglob("*.png")).name
    folder = next((world / "vlguard" / "train").rglob("*.png")).parent
    records = [
        {
            "id": str(i),
            "image": image,
            "conversations": turns("<image>what is this ?", "this is a sunbroth .", "what colour ?", "it is red ."),
        }
        for i in range(4)
    ] + [{"id": "text", "conversations": turns("what ?", "it .")}]
    file = write(tmp_path, *records)
    imported = import_files({"forget": file, "retain": file}, folder, tmp_path / "set")
    assert imported.counts == {"forget": 5, "retain": 5}
    for method in ("npo", "rmu"):
        options = {"name": "rmu", "layer": 0} if method == "rmu" else method
        run_recipe(recipe(tiny_model, tmp_path / "set", tmp_path / method, options))
        assert (tmp_path / method / "model" / "config.json").exists()


def test_what_looks_whole_is_whole() -> None:
    """The quick look of `mix` takes nothing that the reader refuses."""
    good = {"id": "a", "image": "a.png", "conversations": turns("<image>Q?", "A.", "R?", "B.")}
    assert llava.is_complete(good, True)
    assert not llava.is_complete(good, False)
    odd: list[Any] = ["", " ", "x\0", "\ud800", None, 3, [], {}, "<image>", "<image><image>Q?", "ünï"]
    changed = [{**good, key: value} for key in ("id", "image", "conversations") for value in odd]
    for place in range(4):
        for key in ("from", "value"):
            for value in [*odd, "gpt", "human", "user", "system"]:
                texts = [dict(turn) for turn in good["conversations"]]
                texts[place][key] = value
                changed.append({**good, "conversations": texts})
    changed += [{**good, "conversations": good["conversations"][:count]} for count in range(4)]
    changed += [{key: value for key, value in good.items() if key != gone} for gone in good]
    taken = 0
    for value in changed:
        text = json.dumps(value, ensure_ascii=False)
        if llava.is_complete(value, text.isascii() and "\\u" not in text):
            llava.parse(RawRecord(value, lambda: "here"))
            taken += 1
    assert taken > 3
