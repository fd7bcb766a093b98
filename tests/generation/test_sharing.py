"""Prefix sharing changes no answer: an image is prefilled once, and every prompt gets the answer it gets alone."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
from vlm_unlearn.generation.base import GenerationRequest
from vlm_unlearn.generation.decoding import SeededSampling, neutral_generation_config
from vlm_unlearn.generation.hf import generate_texts, make_batches
from vlm_unlearn.generation.sharing import PrefixSharingError, PromptQueue, group_prompts, pad_left
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.modeling.structure import PREFIX_SHARING_FAMILIES
from vlm_unlearn.modeling.trainable import prepare_trainable
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.records import Prompt

SHARING_FAMILIES = sorted({*PREFIX_SHARING_FAMILIES, "pixtral"})  # a llava with another vision tower
MAX_NEW_TOKENS = 12
QUESTIONS = [  # index of the image, and question
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


@pytest.fixture(scope="module", params=SHARING_FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.shared_folder(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    files, random = [], torch.Generator().manual_seed(0)
    for number, (width, height) in enumerate(((64, 48), (30, 70), (20, 20))):
        files.append(tmp_path_factory.mktemp("images") / f"{number}.png")
        pixels = bytes(torch.randint(256, (3 * width * height,), generator=random).tolist())
        Image.frombytes("RGB", (width, height), pixels).save(files[-1])
    return files


def make_turns(images: Sequence[Path], indices: Sequence[int] = range(len(QUESTIONS))) -> list[Turn]:
    return [
        Turn(f"t{index}", None if (image := QUESTIONS[index][0]) is None else images[image], QUESTIONS[index][1], None)
        for index in indices
    ]


class RecordingGreedy(SeededSampling):
    """Greedy decoding that records the scores [V] of every step of each row."""

    def __init__(self, num_rows: int) -> None:
        self.scores: list[list[torch.Tensor]] = [[] for _ in range(num_rows)]
        self._active = self.scores

    def select_rows(self, rows: Sequence[int]) -> SeededSampling:
        selected = copy.copy(self)
        selected._active = [self._active[row] for row in rows]
        return selected

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, row_scores in zip(self._active, scores, strict=True):
            row.append(row_scores)
        return scores


@functools.cache
def load_once(folder: Path, attention: str) -> tuple[Any, Any]:
    return load_model(folder, "fp32", attention).eval(), load_processor(folder)


def load_with_numbers(folder: Path, attention: str = "auto") -> tuple[Any, Any]:
    """Returns model and processor. The processor decodes tokens to numbers, since random bytes are rarely text."""
    model, processor = copy.deepcopy(load_once(folder, attention))
    processor.batch_decode = lambda rows, **_: [" ".join(str(token) for token in row.tolist() if token) for row in rows]
    return model, processor


def generate_alone(model: Any, processor: Any, turn: Turn) -> tuple[str, torch.Tensor]:
    """Returns the text and the scores [N, V] that plain transformers generates for one turn."""
    inputs = encode(processor, [turn], "left")
    recorder = RecordingGreedy(1)
    with neutral_generation_config(model), torch.no_grad():
        output = model.generate(
            **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, logits_processor=LogitsProcessorList([recorder])
        )
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :])[0], torch.stack(recorder.scores[0])


def texts_of(outputs: Sequence[tuple[str, str]]) -> list[str]:
    return [text for text, _ in outputs]


@contextmanager
def record_inputs(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collects the input ids of every forward pass."""
    inputs: list[torch.Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _module, args, _output: inputs.append(args[0]))
    yield inputs
    hook.remove()


def shapes(tensors: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


SDPA, EAGER = ("sdpa", None), ("eager", 3)
FAST_ATTENTION = {("llava", SDPA), ("llava_next", EAGER), ("qwen2_5_vl", SDPA), ("qwen2_5_vl", EAGER)}


@pytest.mark.parametrize(
    ("folder", "attention", "batch_size"),
    [
        pytest.param(family, *settings, marks=() if (family, settings) in FAST_ATTENTION else pytest.mark.slow)
        for family in SHARING_FAMILIES
        for settings in (SDPA, EAGER)
    ],
    indirect=["folder"],
)
def test_shared_answers_and_scores_equal_those_alone(
    folder: Path, images: list[Path], attention: Any, batch_size: int | None
) -> None:
    model, processor = load_with_numbers(folder, attention)
    turns = make_turns(images)
    expected = [generate_alone(model, processor, turn) for turn in turns]
    first_scores = torch.stack([scores[0] for _, scores in expected])
    distances = (first_scores[:, None] - first_scores).abs().amax(dim=-1)
    # Every prompt differs from all others but itself and, in one case, a duplicate.
    assert ((distances > 1e-2).sum(dim=1) >= 7).all()
    assert len({text for text, _ in expected}) > 5
    for indices in (range(9), range(8, -1, -1), [0, 2, 8], [6, 7], [4], [6], [5, 6], [0, 3, 3]):
        selected = [turns[index] for index in indices]
        outputs = generate_texts(model, processor, selected, MAX_NEW_TOKENS, batch_size=batch_size)
        assert texts_of(outputs) == [expected[index][0] for index in indices], indices
    recorder = RecordingGreedy(len(turns))
    generate_texts(model, processor, turns, MAX_NEW_TOKENS, recorder, batch_size)
    for row_scores, (_, scores) in zip(recorder.scores, expected, strict=True):
        torch.testing.assert_close(torch.stack(row_scores)[: len(scores)], scores, atol=1e-3, rtol=1e-4)


def test_conversations_share_their_image_and_earlier_rounds(folder: Path, images: list[Path]) -> None:
    model, processor = load_with_numbers(folder)
    history = ((("Who is there ?", "A man ."),), (("Who is there ?", "A man ."), ("Why ?", "I do not know .")), ())
    turns = [
        Turn(f"{index}", image, question, None, history[index % 3])
        for index, (image, question) in enumerate([(images[0], "What is this ?"), (images[0], "Why ?")] * 3)
    ]
    expected = [generate_alone(model, processor, turn)[0] for turn in turns]
    with record_inputs(model) as inputs:
        assert texts_of(generate_texts(model, processor, turns, MAX_NEW_TOKENS)) == expected
    image_tokens = sum(int((ids == model.config.image_token_id).sum()) for ids in inputs)
    alone = encode(processor, [turns[0]], "left")["input_ids"]
    assert image_tokens == int((alone == model.config.image_token_id).sum())  # the image runs once


@pytest.mark.parametrize(("suffix", "is_shared"), [("", True), (" why", False)], ids=["after image", "and at the end"])
def test_tokens_that_processor_adds_after_image(
    folder: Path, images: list[Path], suffix: str, is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixtral's processor adds a token after each image. A processor that changes the remaining text cannot share."""
    model, processor = load_with_numbers(folder)
    image = processor.image_token

    class AddingProcessor(type(processor)):  # type: ignore[misc]
        def __call__(self, text: list[str], **kwargs: Any) -> Any:
            return super().__call__(text=[t.replace(image, image + " what") + suffix for t in text], **kwargs)

    monkeypatch.setattr(processor, "__class__", AddingProcessor)
    turns = make_turns(images, [0, 1, 2, 8])
    expected = [generate_alone(model, processor, turn)[0] for turn in turns]
    assert texts_of(generate_texts(model, processor, turns, MAX_NEW_TOKENS)) == expected
    queue = PromptQueue(VisionLanguageModel(model, processor), turns, range(4), MAX_NEW_TOKENS)
    with nullcontext() if is_shared else pytest.raises(PrefixSharingError), torch.no_grad():
        queue.prefill(4)


def test_each_image_and_each_prompt_runs_once(
    folder: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three questions about one image with three samples each, and one question about another image."""
    model, processor = copy.deepcopy(load_once(folder, "auto"))
    opened = []
    monkeypatch.setattr(encoding, "open_image", lambda path: (opened.append(path), open_image(path))[1])
    turns = make_turns(images, [0, 0, 0, 2, 2, 2, 8, 8, 8, 4])
    input_ids = [encode(processor, [turn], "left")["input_ids"] for turn in turns]
    image_tokens = [int((ids == model.config.image_token_id).sum()) for ids in input_ids]
    opened.clear()
    with record_inputs(model) as inputs:
        generate_texts(model, processor, turns, 3, SeededSampling(range(10), 1.0, 1.0, model.device))
    (num_groups, prefix_width), (num_prompts, suffix_width), *steps = shapes(inputs)
    assert (num_groups, num_prompts) == (2, 4)
    assert 2 * prefix_width + 4 * suffix_width < 0.75 * sum(ids.shape[1] for ids in input_ids)
    assert steps == [(10, 1)] * 3
    image_tokens_run = sum(int((ids == model.config.image_token_id).sum()) for ids in inputs)
    assert image_tokens_run == image_tokens[0] + image_tokens[-1]
    assert opened == [images[0], images[1]]
    with record_inputs(model) as inputs:
        generate_texts(model, processor, turns, 3)  # a prompt has one greedy answer
    assert shapes(inputs) == [(2, prefix_width), (4, suffix_width)] + [(4, 1)] * 3


def test_rows_that_have_ended_are_dropped(folder: Path, images: list[Path]) -> None:
    model, processor = load_with_numbers(folder)
    turns = make_turns(images, [0, 1, 2, 5])
    complete = [text.split() for text in texts_of(generate_texts(model, processor, turns, MAX_NEW_TOKENS))]

    def lengths_with(eos_tokens: Sequence[str]) -> list[int]:
        ends = [[tokens.index(eos) + 1 for eos in eos_tokens if eos in tokens] for tokens in complete]
        return [min(positions, default=MAX_NEW_TOKENS) for positions in ends]

    # Two tokens of the answers become end-of-sequence tokens: those with which the answers differ most in length.
    pairs = itertools.combinations(sorted({token for tokens in complete for token in tokens}), 2)
    eos_tokens = max(pairs, key=lambda pair: len(set(lengths_with(pair))))
    model.generation_config.eos_token_id = [int(token) for token in eos_tokens]
    lengths = lengths_with(eos_tokens)
    assert len(set(lengths)) > 1
    with record_inputs(model) as inputs:
        outputs = generate_texts(model, processor, turns, MAX_NEW_TOKENS)
    expected = [tokens[:length] for tokens, length in zip(complete, lengths, strict=True)]
    assert [text.split() for text, _ in outputs] == expected
    assert [reason == "stop" for _, reason in outputs] == [any(e in tokens for e in eos_tokens) for tokens in complete]
    num_running, rows = [], len(turns)  # a row is dropped when a quarter of the rows has ended
    for step in range(max(lengths)):
        unfinished = sum(length > step for length in lengths)
        rows = unfinished if unfinished <= 0.75 * rows else rows
        num_running.append(rows)
    assert shapes(inputs)[2:] == [(count, 1) for count in num_running]


def test_prompts_follow_rows_that_have_ended(folder: Path, images: list[Path]) -> None:
    """The image of each question is prefilled once, although the questions on it start at different times."""
    model, processor = load_with_numbers(folder)
    turns = make_turns(images, [0, 1, 2, 4, 5, 8])
    alone = [generate_texts(model, processor, [turn], MAX_NEW_TOKENS)[0] for turn in turns]
    tokens = [text.split() for text, _ in alone]
    eos = max(
        sorted({token for answer in tokens for token in answer}),
        key=lambda token: len({answer.index(token) if token in answer else None for answer in tokens}),
    )
    model.generation_config.eos_token_id = int(eos)
    expected = [generate_texts(model, processor, [turn], MAX_NEW_TOKENS)[0] for turn in turns]
    assert len({len(text.split()) for text, _ in expected}) > 1
    for batch_size in (1, 2, 3, 4):
        with record_inputs(model) as inputs:
            outputs = generate_texts(model, processor, turns, MAX_NEW_TOKENS, batch_size=batch_size)
        assert outputs == expected
        assert max(len(ids) for ids in inputs) <= batch_size
        passes = [ids for ids in inputs if ids.shape[1] > 1]  # not the generated tokens
        assert sum(int((ids == model.config.image_token_id).sum()) for ids in passes) == sum(
            int((encode(processor, [turns[index]], "left")["input_ids"] == model.config.image_token_id).sum())
            for index in (0, 1, 4)
        )
    with record_inputs(model) as inputs:
        generate_texts(model, processor, turns, MAX_NEW_TOKENS, batch_size=2)
    num_steps = sum(ids.shape[1] == 1 for ids in inputs)
    lengths = [len(text.split()) for text, _ in expected]
    pairs = [max(lengths[index : index + 2]) for index in range(0, len(lengths), 2)]
    assert num_steps <= sum(pairs) + len(turns)


def test_samples_do_not_depend_on_the_batch_size(folder: Path, images: list[Path]) -> None:
    model, processor = load_with_numbers(folder)
    turns = make_turns(images, [0, 1, 0, 2, 0, 4])

    def sample(batch_size: int) -> list[tuple[str, str]]:
        sampler = SeededSampling(range(len(turns)), 2.0, 0.9, model.device)
        return generate_texts(model, processor, turns, MAX_NEW_TOKENS, sampler, batch_size)

    assert sample(1) == sample(2) == sample(4) == sample(6)


def test_samples_equal_those_of_row_alone(folder: Path, images: list[Path]) -> None:
    model, processor = load_with_numbers(folder)
    turns = make_turns(images, [0, 0, 2, 4, 4])

    def sample_rows(rows: Sequence[int]) -> list[str]:
        sampler = SeededSampling([100 + row for row in rows], 2.0, 0.9, model.device)
        return texts_of(generate_texts(model, processor, [turns[row] for row in rows], MAX_NEW_TOKENS, sampler))

    batch = sample_rows(range(5))
    assert len(set(batch)) == 5
    assert batch == [sample_rows([row])[0] for row in range(5)]


def test_model_with_adapters_shares_prefixes(folder: Path, images: list[Path]) -> None:
    model, processor = load_with_numbers(folder)
    turns = make_turns(images)
    base_outputs = generate_texts(model, processor, turns, MAX_NEW_TOKENS)
    model = prepare_trainable(
        VisionLanguageModel(model), TrainableConfig.model_validate({"mode": "lora", "lora": {"r": 2}})
    ).model.eval()
    assert generate_texts(model, processor, turns, MAX_NEW_TOKENS) == base_outputs
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    outputs = generate_texts(model, processor, turns, MAX_NEW_TOKENS)
    assert outputs != base_outputs
    assert texts_of(outputs) == [generate_alone(model, processor, turn)[0] for turn in turns]


def test_short_sliding_window_disables_sharing(images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    """The window would count the padding between image and question."""
    model, processor = load_with_numbers(families.shared_folder("llava_next", tmp_path_factory))
    turns = make_turns(images, [0, 1, 2])
    longest = max(encode(processor, [turn], "left")["input_ids"].shape[1] for turn in turns)
    without_window = [generate_alone(model, processor, turn)[0] for turn in turns]
    model.config.text_config.sliding_window = longest // 2
    expected = [generate_alone(model, processor, turn)[0] for turn in turns]
    assert expected != without_window
    with record_inputs(model) as inputs:
        assert texts_of(generate_texts(model, processor, turns, MAX_NEW_TOKENS)) == expected
    assert shapes(inputs)[0] == (3, longest)


def test_group_prompts_returns_longest_common_prefixes() -> None:
    prompts = [[1, 2, 3, 4], [1, 2, 5], [6, 7], [8, 9, 8], [8, 9, 8]]
    assert group_prompts(prompts, ["a", "a", "b", None, None], [1, 1, 1, 0, 0]) == ([0, 0, 1, 2, 2], [2, 1, 2])
    assert group_prompts([[1, 2], [1, 3]], ["a", "a"], [2, 2]) == ([0, 1], [1, 1])  # the tokens before the image differ
    assert group_prompts([[1], [2, 3]], [None, None], [0, 0]) == ([0, 0], [0])


def test_pad_left() -> None:
    ids, mask = pad_left([[1, 2], [], [3]], torch.device("cpu"))
    assert ids.tolist() == [[1, 2], [0, 0], [0, 3]]
    assert mask.tolist() == [[1, 1], [0, 0], [0, 1]]


def test_make_batches_groups_requests_by_image() -> None:
    def request(number: int, image: str | None, words: int, sample: int = 0) -> GenerationRequest:
        text = " ".join(["word"] * words)
        prompt = Prompt(id=f"p{number}", group_id="g", set="s", kind="safe", question=text, image=image)
        return GenerationRequest(prompt, sample, None if image is None else Path(image))

    requests = [
        request(1, "a", 9),
        request(2, "b", 2),
        request(3, "a", 1),
        request(4, "c", 3),
        request(5, "b", 2, 1),
        request(6, None, 4),
    ]
    requests += [request(7, "d", number) for number in (30, 20, 10, 40, 50)]
    batches = make_batches(requests, 4)
    assert [[(r.prompt.id, r.prompt.question.count("word")) for r in batch] for batch in batches] == [
        [("p3", 1), ("p1", 9), ("p2", 2), ("p5", 2)],
        [("p4", 3)],
        [("p7", 10), ("p7", 20), ("p7", 30), ("p7", 40)],
        [("p7", 50)],
        [("p6", 4)],
    ]
