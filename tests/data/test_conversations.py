"""LLaVA conversations with several rounds: reading, writing, and training on them as one sequence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import raises_code, recipe
from vlm_unlearn.data.encoding import PromptMeter, Turn, encode_with_labels, render
from vlm_unlearn.data.formats import llava
from vlm_unlearn.data.formats.fields import RawRecord
from vlm_unlearn.data.special_tokens import break_special_tokens
from vlm_unlearn.data_tools.importers import import_files
from vlm_unlearn.errors import Problems
from vlm_unlearn.losses import IGNORED, answer_nll
from vlm_unlearn.modeling.loader import load_processor


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def write(folder: Path, *records: Any) -> Path:
    (folder / "a.json").write_text(json.dumps(list(records)))
    return folder / "a.json"


def test_read_llava_rounds_become_history(tmp_path: Path) -> None:
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
    ("record", "code", "field"),
    [
        ({"conversations": turns("Q?")}, "invalid-field", "conversations"),
        ({"conversations": []}, "invalid-field", "conversations"),
        ({"conversations": turns("Q?", "A.", "Q?")}, "invalid-field", "conversations"),
        (
            {"conversations": [{"from": "system", "value": "x"}, *turns("Q?", "A.")]},
            "invalid-field",
            "conversations",
        ),
        ({"conversations": turns("<image>", "A."), "image": "a.png"}, "empty-field", "conversations[0].value"),
        ({"conversations": turns("<image>Q?", "A.")}, "missing-field", "conversations"),
        (
            {"conversations": turns("<image><image>Q?", "A."), "image": "a.png"},
            "placeholder-in-text",
            "conversations",
        ),
        ({"conversations": turns("Q?", "<image>A.")}, "placeholder-in-text", "conversations[1].value"),
        ({"conversations": turns("Q?", "")}, "empty-field", "conversations[1].value"),
        ({"conversations": turns("Q?", "A."), "image": ["a.png", "b.png"]}, "invalid-field", "image"),
        ({"conversations": turns("Q\ud800?", "A.")}, "invalid-encoding", "conversations[0].value"),
        ({"conversations": turns("Q\0?", "A.")}, "invalid-encoding", "conversations[0].value"),
        ({"text": "x"}, "invalid-field", "conversations"),
    ],
)
def test_read_llava_broken_record_names_field(tmp_path: Path, record: dict[str, Any], code: str, field: str) -> None:
    file = write(tmp_path, {"id": "bad", **record}, {"conversations": turns("Q?", "A.")})
    problems = Problems()
    assert len(list(llava.read_llava(file, None, problems))) == 1
    with raises_code(code, file="a.json", record='1 (line 1, "bad")', field=field) as caught:
        list(llava.read_llava(file, None))
    assert problems.messages == [str(caught.value)]
    assert problems.codes == [code]


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return load_processor(tiny_model)


def answers(processor: Any, labels: torch.Tensor) -> list[str]:
    """The labeled spans as text."""
    spans: list[list[int]] = []
    previous = IGNORED
    for label in labels.tolist():
        if label != IGNORED:
            if previous == IGNORED:
                spans.append([])
            spans[-1].append(label)
        previous = label
    return [processor.tokenizer.decode(span) for span in spans]


LLAVA15 = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}"
    "{{ '<image>\n' if c['type'] == 'image' else c['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def template(opening: str, closing: str) -> str:
    """A template with headers and closing tokens, such as those of ChatML, Llama 3 and Phi."""
    return (
        "{% for m in messages %}{{ '" + opening + "' | replace('ROLE', m['role']) }}{% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{{ '" + closing + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + opening + "' | replace('ROLE', 'assistant') }}{% endif %}"
    )


TEMPLATES = {  # template, special tokens, end-of-sequence token, closing token of an answer
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
    """A LLaVA processor whose tokenizer has one token per byte, and the special tokens."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    bytes_ = Tokenizer(BPE({char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
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
def test_encode_labels_every_answer_with_its_closing_token(name: str, first: str, world: Path) -> None:
    """The labels include the closing token of the template, or else the end-of-sequence token, but no white space."""
    chat_template, special, end, closing = TEMPLATES[name]
    processor = byte_processor(chat_template, special, end)
    image = next((world / "vlguard" / "train").rglob("*.png"))
    turn = Turn("x", image, "What?", "So.\n", (("Which?", first), ("Why?", "B.")))
    batch = encode_with_labels(processor, [turn, Turn("y", None, "What?", "It.")], 4000)
    labeled = [answers(processor, row) for row in batch["labels"]]
    if "<|im_end|>" in special:
        first = first.replace("<|im_end|>", "< |im_end|>")  # in an answer, it is text
    expected = [[f"{text.strip()}{closing}" for text in (first, "B.", "So.")], [f"It.{closing}"]]
    # The space or line break that a template puts before an answer may be labeled too.
    assert [[text.strip() for text in row] for row in labeled] == expected
    assert PromptMeter(processor).total_tokens(turn) == int(batch["attention_mask"][0].sum())


def test_encode_empty_answer_raises(processor: Any) -> None:
    with raises_code("empty-answer", record='"x"'):
        encode_with_labels(processor, [Turn("x", None, "what ?", " \n")], 512)


def test_conversation_loss_is_sum_of_round_losses(processor: Any, world: Path, tiny_model: Path) -> None:
    """The loss of a conversation is the sum of the losses of its answers, each conditioned on the text before it."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(tiny_model).eval()
    image = next((world / "vlguard" / "train").rglob("*.png"))

    def nll(turn: Turn, last: bool = False) -> float:
        batch = encode_with_labels(processor, [turn], 512)
        labels = batch.pop("labels")
        if last:  # only the last answer
            spans = (labels[0] != IGNORED).nonzero()[:, 0]
            first = max(index for index in spans.tolist() if labels[0, index - 1] == IGNORED)
            labels[:, :first] = IGNORED
        with torch.no_grad():
            return float(answer_nll(model(**batch).logits, labels)[0].sum())

    single = Turn("x", image, "what is this ?", "this is a sunbroth .")
    conversation = Turn("x", image, "what colour is it ?", "it is red .", ((single.question, str(single.answer)),))
    assert nll(conversation) == pytest.approx(nll(single) + nll(conversation, last=True), rel=1e-5)


def test_encode_max_length_truncates_answers_not_the_image(processor: Any, world: Path) -> None:
    image = next((world / "vlguard" / "train").rglob("*.png"))
    turn = Turn("x", image, "what colour is it ?", "it is red .", (("what is this ?", "this is a sunbroth ."),))
    meter = PromptMeter(processor)
    prompt_length = meter.prompt_tokens(turn)
    assert prompt_length < meter.total_tokens(turn)
    complete = encode_with_labels(processor, [turn], 512)
    truncated = encode_with_labels(processor, [turn], prompt_length + 2)
    assert truncated["input_ids"].shape[1] == prompt_length + 2 < complete["input_ids"].shape[1]
    assert int((truncated["labels"] != IGNORED).sum()) == 2
    with raises_code("question-too-long", record='"x"') as caught:
        encode_with_labels(processor, [turn], prompt_length)
    assert "training.max_length" in str(caught.value)


def test_render_neutralizes_special_tokens_in_every_text(processor: Any) -> None:
    """The texts of people must not end a turn, start another one, or ask for an image."""
    tokens = ("<image>", "</s>", "<s>", "<pad>")
    hostile = "what is it ? " + " ".join(tokens)
    turn = Turn("x", None, hostile, hostile, ((hostile, hostile),))
    usual = render(processor, Turn("x", None, "what ?", "what", (("what ?", "what"),)))
    rendering = render(processor, turn)
    for token in tokens:
        assert rendering.text.count(token) == usual.text.count(token), token
        assert f"{token[0]} {token[1:]}" in rendering.text
    ids = processor.tokenizer(rendering.text, add_special_tokens=False)["input_ids"]
    usual_ids = processor.tokenizer(usual.text, add_special_tokens=False)["input_ids"]
    special = set(processor.tokenizer.all_special_ids) - {processor.tokenizer.unk_token_id}
    assert [id for id in ids if id in special] == [id for id in usual_ids if id in special]


def test_render_neutralized_text_before_the_image_stays_before_it(processor: Any) -> None:
    turn = Turn("x", "image.png", "</s> look and <image> tell", None, image_offset=len("</s> look"))
    text = render(processor, turn).text
    assert text.count("<image>") == 1
    assert text.index("< /s> look") < text.index("<image>") < text.index("< image> tell")


@pytest.mark.parametrize("token", ["</s>", "<|im_end|>", "<image>", "[INST]", "<end_of_turn>", "<\uff5cUser\uff5c>"])
def test_break_special_tokens_for_a_server(token: str) -> None:
    assert break_special_tokens(f"a {token} b") == f"a {token[0]} {token[1:]} b"
    assert break_special_tokens("if a < s and [x] > 3 then <b>bold</b>") == "if a < s and [x] > 3 then <b>bold</b>"


@pytest.mark.slow
def test_run_recipe_trains_on_conversations(tiny_model: Path, world: Path, tmp_path: Path) -> None:
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
        run_recipe(recipe(tiny_model, tmp_path / "set", tmp_path / method, options, training={"max_steps": 1}))
        assert (tmp_path / method / "model" / "config.json").exists()


def test_is_complete_accepts_only_records_that_parse_accepts() -> None:
    """The fast check of `mix` accepts nothing that `parse` rejects."""
    good = {"id": "a", "image": "a.png", "conversations": turns("<image>Q?", "A.", "R?", "B.")}
    assert llava.is_complete(good, True)
    assert not llava.is_complete(good, False)
    odd: list[Any] = ["", " ", "x\0", "\ud800", None, 3, [], {}, "<image>", "<image><image>Q?", "ünï"]
    changed = [{**good, key: value} for key in ("id", "image", "conversations") for value in odd]
    for index in range(4):
        for key in ("from", "value"):
            for value in [*odd, "gpt", "human", "user", "system"]:
                texts = [dict(turn) for turn in good["conversations"]]
                texts[index][key] = value
                changed.append({**good, "conversations": texts})
    changed += [{**good, "conversations": good["conversations"][:count]} for count in range(4)]
    changed += [{key: value for key, value in good.items() if key != missing} for missing in good]
    accepted = 0
    for value in changed:
        text = json.dumps(value, ensure_ascii=False)
        if llava.is_complete(value, text.isascii() and "\\u" not in text):
            llava.parse(RawRecord(value))
            accepted += 1
    assert accepted > 3
