"""What a batch shares changes no answer: an image is prefilled once, and each question is answered as alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LogitsProcessorList

import families
from vlm_unlearn.config import TrainableConfig
from vlm_unlearn.data import encoding
from vlm_unlearn.data.encoding import Turn, encode
from vlm_unlearn.data.images import open_image
from vlm_unlearn.generation import hf
from vlm_unlearn.generation.base import GenerationRequest
from vlm_unlearn.generation.decoding import SeededSampling, neutral_generation_config
from vlm_unlearn.generation.hf import generate_texts, make_batches
from vlm_unlearn.generation.sharing import lay_out, prefill
from vlm_unlearn.models.layout import LAYOUTS
from vlm_unlearn.models.loader import load_model, load_processor
from vlm_unlearn.models.trainable import prepare_trainable
from vlm_unlearn.records import Prompt

SHARING = [family for family, layout in LAYOUTS.items() if layout.supports_prefix_sharing]
TOKENS = 12
ASKED = [  # the image, by number, and the question
    (0, "What is this ?"),
    (1, "Tell me in a few words what this is , and what is beside it ."),
    (0, "Who is there , and why ?"),
    (0, "What is this ?"),
    (1, "What is this ?"),
    (2, "Why ?"),
    (None, "What is this ?"),
    (None, "Say it again , please ."),
    (0, "Tell me in a few words what this is , and what is beside it ."),
]


@pytest.fixture(scope="module", params=SHARING)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    built: Path = tmp_path_factory.mktemp(request.param)
    families.build(request.param, built)
    return built


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    files, random = [], torch.Generator().manual_seed(0)
    for number, (width, height) in enumerate(((64, 48), (30, 70), (20, 20))):
        files.append(tmp_path_factory.mktemp("images") / f"{number}.png")
        Image.frombytes(
            "RGB", (width, height), bytes(torch.randint(256, (3 * width * height,), generator=random).tolist())
        ).save(files[-1])
    return files


def turns(images: Sequence[Path], numbers: Sequence[int] = range(len(ASKED))) -> list[Turn]:
    return [
        Turn(f"t{number}", None if (image := ASKED[number][0]) is None else images[image], ASKED[number][1], None)
        for number in numbers
    ]


class Listening(SeededSampling):
    """Greedy decoding that keeps the scores [V] of each row's every step."""

    def __init__(self, count: int) -> None:
        self.heard: list[list[torch.Tensor]] = [[] for _ in range(count)]
        self._rows = self.heard

    def keep(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[row] for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, found in zip(self._rows, scores, strict=True):
            row.append(found)
        return scores


def spelling(folder: Path) -> Any:
    """A processor whose texts are the numbers of the tokens, 0 being padding: random bytes are seldom text."""
    processor = load_processor(folder)
    processor.batch_decode = lambda rows, **_: [" ".join(str(token) for token in row.tolist() if token) for row in rows]
    return processor


def alone(model: Any, processor: Any, turn: Turn) -> tuple[str, torch.Tensor]:
    """What transformers makes of one question, with nothing of ours beside it, and its scores [N, V]."""
    inputs = encode(processor, [turn], "left")
    listening = Listening(1)
    with neutral_generation_config(model), torch.no_grad():
        output = model.generate(
            **inputs, max_new_tokens=TOKENS, do_sample=False, logits_processor=LogitsProcessorList([listening])
        )
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :])[0], torch.stack(listening.heard[0])


@contextmanager
def embedded(model: Any) -> Iterator[list[torch.Tensor]]:
    """Every tensor of tokens that the model runs."""
    seen: list[torch.Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    yield seen
    hook.remove()


def shapes(tensors: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


@pytest.mark.parametrize(("attention", "stride"), [("sdpa", 32), ("sdpa", 3), ("eager", 3)])
def test_answers_are_those_of_one_by_one(
    folder: Path, images: list[Path], attention: Any, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "CHUNK_TOKENS", stride)
    model, processor = load_model(folder, "fp32", attention).eval(), spelling(folder)
    asked = turns(images)
    expected = [alone(model, processor, turn) for turn in asked]
    firsts = torch.stack([scores[0] for _, scores in expected])
    apart = (firsts[:, None] - firsts).abs().amax(dim=-1)
    assert ((apart > 1e-2).sum(dim=1) >= 7).all()  # all but the question itself, and the one that is asked twice
    assert len({text for text, _ in expected}) > 5
    for numbers in (range(9), range(8, -1, -1), [0, 2, 8], [6, 7], [4], [6], [5, 6], [0, 3, 3]):
        said = [text for text, _ in generate_texts(model, processor, [asked[number] for number in numbers], TOKENS)]
        assert said == [expected[number][0] for number in numbers], numbers
    listening = Listening(len(asked))
    generate_texts(model, processor, asked, TOKENS, listening)
    for found, (_, scores) in zip(listening.heard, expected, strict=True):
        torch.testing.assert_close(torch.stack(found)[: len(scores)], scores, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("end", "shares"), [("", True), (" why", False)], ids=["behind the image", "and at the end"])
def test_tokens_that_close_an_image(
    folder: Path, images: list[Path], end: str, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixtral's processor puts one behind each image; what it does with the rest of a text must be known, or nothing is shared."""
    model, processor = load_model(folder, "fp32").eval(), spelling(folder)
    image = processor.image_token

    class Closing(type(processor)):  # type: ignore[misc]
        def __call__(self, text: list[str], **others: Any) -> Any:
            return super().__call__(text=[one.replace(image, image + " what") + end for one in text], **others)

    monkeypatch.setattr(processor, "__class__", Closing)
    asked = turns(images, [0, 1, 2, 8])
    expected = [alone(model, processor, turn)[0] for turn in asked]
    assert [said for said, _ in generate_texts(model, processor, asked, TOKENS)] == expected
    assert (prefill(model, processor, asked, range(4), TOKENS) is not None) == shares


def test_each_image_and_each_prompt_is_run_once(
    folder: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three questions on one image, three samples of each, beside one on another image."""
    model, processor = load_model(folder, "fp32").eval(), load_processor(folder)
    opened = []
    monkeypatch.setattr(encoding, "open_image", lambda path: (opened.append(path), open_image(path))[1])
    asked = turns(images, [0, 0, 0, 2, 2, 2, 8, 8, 8, 4])
    lengths = [encode(processor, [turn], "left")["input_ids"].shape[1] for turn in asked]
    image_tokens = [
        int((encode(processor, [turn], "left")["input_ids"] == model.config.image_token_id).sum()) for turn in asked
    ]
    opened.clear()
    with embedded(model) as seen:
        generate_texts(model, processor, asked, 3, SeededSampling(range(10), 1.0, 1.0, model.device))
    (images_run, beginning), (prompts, rest), *steps = shapes(seen)
    assert (images_run, prompts) == (2, 4)
    assert 2 * beginning + 4 * rest < 0.75 * sum(lengths)
    assert steps == [(10, 1)] * 3
    assert (
        sum(int((tokens == model.config.image_token_id).sum()) for tokens in seen) == image_tokens[0] + image_tokens[-1]
    )
    assert opened == [images[0], images[1]]
    with embedded(model) as seen:
        generate_texts(model, processor, asked, 3)  # a prompt has one greedy answer
    assert shapes(seen) == [(2, beginning), (4, rest)] + [(4, 1)] * 3


def test_rows_that_have_ended_are_left_out(folder: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "CHUNK_TOKENS", 2)
    model, processor = load_model(folder, "fp32").eval(), spelling(folder)
    asked = turns(images, [0, 1, 2, 5])
    whole = [text.split() for text, _ in generate_texts(model, processor, asked, TOKENS)]
    ends = [whole[0][0], whole[1][2]]  # tokens that end an answer from now on
    model.generation_config.eos_token_id = [int(end) for end in ends]
    lengths = [min([text.index(end) + 1 for end in ends if end in text], default=TOKENS) for text in whole]
    assert len(set(lengths)) > 1
    with embedded(model) as seen:
        said = generate_texts(model, processor, asked, TOKENS)
    assert [text.split() for text, _ in said] == [text[:length] for text, length in zip(whole, lengths, strict=True)]
    assert [reason == "stop" for _, reason in said] == [any(end in text for end in ends) for text in whole]
    running = [sum(length > step - step % 2 for length in lengths) for step in range(max(lengths))]
    assert shapes(seen)[2:] == [(count, 1) for count in running if count]


def test_a_draw_is_that_of_the_row_alone(folder: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "CHUNK_TOKENS", 5)
    model, processor = load_model(folder, "fp32").eval(), spelling(folder)
    asked = turns(images, [0, 0, 2, 4, 4])

    def sample_rows(rows: Sequence[int]) -> list[str]:
        drawing = SeededSampling([100 + row for row in rows], 2.0, 0.9, model.device)
        return [text for text, _ in generate_texts(model, processor, [asked[row] for row in rows], TOKENS, drawing)]

    together = sample_rows(range(5))
    assert len(set(together)) == 5
    assert together == [sample_rows([row])[0] for row in range(5)]


def test_a_model_with_adapters_shares(folder: Path, images: list[Path]) -> None:
    model, processor = load_model(folder, "fp32"), spelling(folder)
    asked = turns(images)
    plain = generate_texts(model.eval(), processor, asked, TOKENS)
    model = prepare_trainable(model, TrainableConfig.model_validate({"mode": "lora", "lora": {"r": 2}})).eval()
    assert generate_texts(model, processor, asked, TOKENS) == plain
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    said = generate_texts(model, processor, asked, TOKENS)
    assert said != plain
    assert [text for text, _ in said] == [alone(model, processor, turn)[0] for turn in asked]


def test_a_short_sliding_window_is_not_shared(images: list[Path], tmp_path: Path) -> None:
    """It would count the padding between an image and the questions."""
    families.build("llava_next", tmp_path)
    model, processor = load_model(tmp_path, "fp32").eval(), spelling(tmp_path)
    asked = turns(images, [0, 1, 2])
    longest = max(encode(processor, [turn], "left")["input_ids"].shape[1] for turn in asked)
    before = [alone(model, processor, turn)[0] for turn in asked]
    model.config.text_config.sliding_window = longest // 2
    expected = [alone(model, processor, turn)[0] for turn in asked]
    assert expected != before
    with embedded(model) as seen:
        assert [text for text, _ in generate_texts(model, processor, asked, TOKENS)] == expected
    assert shapes(seen)[0] == (3, longest)


def test_how_prompts_are_laid_out() -> None:
    ids, mask, shared = lay_out([[1, 2, 3, 4], [1, 2, 5], [6, 7], [8, 9, 8]], [0, 0, 1, 2], 0)
    assert ids.tolist() == [[1, 2, 3, 4], [1, 2, 0, 5], [0, 6, 0, 7], [8, 9, 0, 8]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 1], [0, 1, 0, 1], [1, 1, 0, 1]]
    assert shared == 2
    alike, _, shared = lay_out([[1], [2, 3]], [0, 0], 0)
    assert (alike.tolist(), shared) == ([[0, 1], [2, 3]], 0)


def test_questions_on_one_image_are_asked_together() -> None:
    def question(number: int, image: str | None, words: int, sample: int = 0) -> GenerationRequest:
        text = " ".join(["word"] * words)
        prompt = Prompt(id=f"p{number}", group_id="g", set="s", kind="safe", question=text, image=image)
        return GenerationRequest(prompt, sample, None if image is None else Path(image))

    asked = [
        question(1, "a", 9),
        question(2, "b", 2),
        question(3, "a", 1),
        question(4, "c", 3),
        question(5, "b", 2, 1),
        question(6, None, 4),
    ]
    asked += [question(7, "d", number) for number in (30, 20, 10, 40, 50)]
    found = [
        [(item.prompt.id, item.prompt.question.count("word")) for item in batch] for batch in make_batches(asked, 4)
    ]
    assert found == [
        [("p3", 1), ("p1", 9), ("p2", 2), ("p5", 2)],
        [("p4", 3)],
        [("p7", 10), ("p7", 20), ("p7", 30), ("p7", 40)],
        [("p7", 50)],
        [("p6", 4)],
    ]
