"""Every family that the package knows: labels, padding, generation, saving, images of several sizes and texts without one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import families
from helpers import raises_code, recipe
from vlm_unlearn.config import GenerationConfig, MethodConfig
from vlm_unlearn.data.encoding import IGNORED, Batch, Processor, PromptMeter, Turn, encode, encode_with_labels
from vlm_unlearn.errors import UserError
from vlm_unlearn.generation.hf import generate_responses
from vlm_unlearn.methods import build_method
from vlm_unlearn.models.layout import LAYOUTS, decoder_layers, is_projector, is_vision, layout_of
from vlm_unlearn.models.loader import load_model, load_processor, load_run_model, model_skeleton
from vlm_unlearn.records import Prompt
from vlm_unlearn.store import digest_model
from vlm_unlearn.training.forward import forward
from vlm_unlearn.training.runner import run_recipe
from vlm_unlearn.training.step import ModelStep

LENGTH = 512
ENDS = {"llava": "</s>", "llava_next": "</s>", "mllama": "<|eot_id|>", "gemma3": "<end_of_turn>"} | {
    **dict.fromkeys(("qwen2_5_vl", "internvl"), "<|im_end|>"),
    **dict.fromkeys(("idefics3", "smolvlm"), "<end_of_utterance>"),
}
WITH_VIDEOS = ["qwen2_5_vl", "smolvlm", "internvl"]


class Loaded:
    """A tiny model of a family in eval mode, with its processor and folder."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family = family
        self.folder = folder
        self.model: Any = load_model(folder, "fp32").eval()
        self.processor: Processor = load_processor(folder)

    def nll(self, turns: Sequence[Turn], side: str = "right") -> torch.Tensor:
        """Summed answer NLL [B], as training computes it."""
        return answer_nll(self.model, labelled(self.processor, turns, side))


def answer_nll(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return forward(model, batch).answer_nll[0]


def labelled(processor: Processor, turns: Sequence[Turn], side: str) -> Batch:
    """The turns with labels, padded on either side."""
    right = encode_with_labels(processor, turns, LENGTH)
    if side == "right":
        return right
    batch = encode(processor, turns, "left")
    batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
    for row, length in enumerate(right["attention_mask"].sum(dim=1).tolist()):
        batch["labels"][row, -length:] = right["labels"][row, :length]
    return batch


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches one below the other, smaller tensors filled up with zeros (labels: ignored) at their ends."""
    out: Batch = {}
    for key in dict.fromkeys(key for batch in batches for key in batch):
        parts = [batch[key] for batch in batches if key in batch]
        largest = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].dim())]
        filled = [part.new_full((len(part), *largest), IGNORED if key == "labels" else 0) for part in parts]
        for whole, part in zip(filled, parts, strict=True):
            whole[tuple(slice(size) for size in part.shape)] = part
        out[key] = torch.cat(filled)
    return out


@pytest.fixture(scope="module", params=list(families.FAMILIES))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp(request.param)
    families.build(request.param, folder)
    return Loaded(request.param, folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in three shapes, around three colours: wide, high, square."""
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    shapes = {"wide": (64, 48, (0, 0, 0)), "high": (30, 70, (180, 0, 180)), "square": (40, 40, (180, 180, 0))}
    for name, (width, height, color) in shapes.items():
        pixels = noise.integers(0, 75, (height, width, 3), dtype=np.uint8) + np.array(color, np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def turns(images: Path) -> list[Turn]:
    return [
        Turn("short", images / "wide.png", "What is it?", "A cat."),
        Turn("middle", images / "high.png", "And what is this here?", "It is a longer answer."),
        Turn("rounds", images / "square.png", "And now?", "I can't say.", (("Hm?", "No idea, it is not known."),)),
    ]


TEXT_ONLY = Turn("text", None, "Say it now, will you?", "Yes, I will.")


def test_every_family_has_a_tiny_model() -> None:
    assert set(families.FAMILIES) == set(LAYOUTS)


def test_layout_finds_the_parts(loaded: Loaded) -> None:
    layout = layout_of(loaded.model)
    parts: dict[str, list[str]] = {"vision": [], "projector": [], "layers": [], "rest": []}
    for name, _ in loaded.model.named_parameters():
        found = {
            "vision": is_vision(name, layout),
            "projector": is_projector(name, layout),
            "layers": name.startswith(layout.layers + "."),
        }
        assert sum(found.values()) <= 1
        parts[next((part for part, here in found.items() if here), "rest")].append(name)
    assert all(parts.values())
    assert {".".join(name.split(".")[-2:]) for name in parts["rest"]} <= {
        *("embed_tokens.weight", "norm.weight", "lm_head.weight"),
        "model.image_newline",  # llava_next's learned end of an image row
    }
    assert len(decoder_layers(loaded.model)) == (3 if loaded.family == "mllama" else 2)
    assert len(decoder_layers(model_skeleton(loaded.folder))) == len(decoder_layers(loaded.model))
    assert [name for name, _ in model_skeleton(loaded.folder).named_parameters()] == [
        name for name, _ in loaded.model.named_parameters()
    ]


def test_labels_are_the_answers_and_their_ends(loaded: Loaded, turns: list[Turn]) -> None:
    batch = encode_with_labels(loaded.processor, turns, LENGTH)
    lengths = batch["attention_mask"].sum(dim=1)
    assert len(set(lengths.tolist())) == 3
    for row, (turn, length) in enumerate(zip(turns, lengths.tolist(), strict=True)):
        assert batch["attention_mask"][row, :length].all()  # what is left over is on the right
        labels = batch["labels"][row]
        kept = labels != IGNORED
        assert (labels[kept] == batch["input_ids"][row][kept]).all()
        runs = "".join("x" if here else " " for here in kept).split()
        answers = [answer for _, answer in turn.history] + [turn.answer]
        assert len(runs) == len(answers)
        words = loaded.processor.tokenizer.decode(labels[kept]).split(ENDS[loaded.family])
        assert [word.strip() for word in words] == [*answers, ""]


def test_a_long_answer_is_cut_at_its_end(loaded: Loaded, turns: list[Turn]) -> None:
    whole = encode_with_labels(loaded.processor, turns, LENGTH)
    width = int((whole["labels"][0] != IGNORED).nonzero()[0]) + 3
    cut = encode_with_labels(loaded.processor, turns[:1], width)
    assert cut["input_ids"].shape == (1, width)
    assert (cut["labels"] != IGNORED).sum() == 3
    assert answer_nll(loaded.model, cut).isfinite().all()


def test_the_meter_counts_image_tokens(loaded: Loaded, turns: list[Turn]) -> None:
    meter = PromptMeter(loaded.processor)
    for turn in [*turns, TEXT_ONLY]:
        assert meter.total_tokens(turn) == encode_with_labels(loaded.processor, [turn], LENGTH)["input_ids"].shape[1]


def test_an_answer_costs_the_same_in_any_batch(loaded: Loaded, turns: list[Turn], images: Path) -> None:
    alone = torch.cat([loaded.nll([turn]) for turn in turns])
    torch.testing.assert_close(loaded.nll(turns), alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(loaded.nll(turns[::-1]), alone.flip(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(loaded.nll(turns, "left"), alone, atol=1e-4, rtol=0)
    # A test of images that the model doesn't look at could not fail.
    other = Turn("other", images / "square.png", turns[0].question, turns[0].answer)
    assert (loaded.nll([other]) - alone[0]).abs() > 3e-2


def test_logits_are_kept_at_answers_as_they_are(loaded: Loaded, turns: list[Turn]) -> None:
    batch = encode_with_labels(loaded.processor, turns, LENGTH)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    kept = torch.tensor([5, 9, batch["input_ids"].shape[1] - 1])
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.model(**inputs, logits_to_keep=kept).logits,
            loaded.model(**inputs).logits[:, kept],
            atol=1e-4,
            rtol=0,
        )


def test_batches_can_be_joined(loaded: Loaded, turns: list[Turn]) -> None:
    alone = torch.cat([loaded.nll([turn]) for turn in turns])
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        first, *others = [turns[index] for index in order]
        batch = joined([encode_with_labels(loaded.processor, part, LENGTH) for part in ([first], others)])
        torch.testing.assert_close(answer_nll(loaded.model, batch), alone[order], atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_text_without_image_beside_images(loaded: Loaded, turns: list[Turn], side: str) -> None:
    text = loaded.nll([TEXT_ONLY])
    assert text.isfinite().all()
    torch.testing.assert_close(
        loaded.nll([TEXT_ONLY, Turn("t", None, "Why?", "So it is, so it is.")], side)[:1], text, atol=1e-4, rtol=0
    )
    mixed = [turns[0], TEXT_ONLY, turns[1]]
    if loaded.family == "mllama":
        with raises_code("unsupported-setting", record='"text"'):
            loaded.nll(mixed, side)
        return
    alone = torch.cat([loaded.nll([turn]) for turn in mixed])
    torch.testing.assert_close(loaded.nll(mixed, side), alone, atol=1e-4, rtol=0)
    parts = joined([encode_with_labels(loaded.processor, part, LENGTH) for part in ([TEXT_ONLY], [turns[0]])])
    torch.testing.assert_close(answer_nll(loaded.model, parts), alone[[1, 0]], atol=1e-4, rtol=0)


def test_gradients_reach_every_part(loaded: Loaded, turns: list[Turn]) -> None:
    loaded.model.train()
    nll_sum, _ = forward(loaded.model, encode_with_labels(loaded.processor, turns, LENGTH)).answer_nll
    nll_sum.sum().backward()
    layout = layout_of(loaded.model)
    moved = {
        name
        for name, parameter in loaded.model.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }
    loaded.model.zero_grad(set_to_none=True)
    loaded.model.eval()
    for layer in range(len(decoder_layers(loaded.model))):
        assert any(name.startswith(f"{layout.layers}.{layer}.") for name in moved)
    assert any(is_projector(name, layout) for name in moved)
    assert any(is_vision(name, layout) for name in moved)


def test_generation_in_batches_is_as_alone(loaded: Loaded, images: Path, tmp_path: Path) -> None:
    questions = [
        ("wide", "What?"),
        ("high", "And what is this, in a few words?"),
        (None, "Say it now."),
        ("square", "Tell me of it."),
    ]
    prompts = [
        Prompt(
            id=str(number),
            group_id=str(number),
            kind="safe",
            set="s",
            image=None if name is None else f"{name}.png",
            question=question,
        )
        for number, (name, question) in enumerate(questions)
    ]

    def answers(batch_size: int) -> dict[str, str | None]:
        config = GenerationConfig(max_new_tokens=6, batch_size=batch_size)
        batches = generate_responses(loaded.model, loaded.processor, prompts, {"s": images}, config)
        return {response.prompt_id: response.text for batch in batches for response in batch}

    together = answers(4)
    assert set(together) == {"0", "1", "2", "3"}
    assert any(together.values())
    assert together == answers(1)


def test_saved_and_loaded_it_is_the_same(loaded: Loaded, turns: list[Turn], tmp_path: Path) -> None:
    before = digest_model(loaded.folder)
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.processor.save_pretrained(tmp_path / "saved")
    assert digest_model(loaded.folder) == before
    again = Loaded(loaded.family, tmp_path / "saved")
    batch, reloaded = (encode_with_labels(one.processor, turns, LENGTH) for one in (loaded, again))
    assert set(batch) == set(reloaded)
    assert all(torch.equal(batch[key], reloaded[key]) for key in batch)
    assert torch.equal(answer_nll(again.model, reloaded), answer_nll(loaded.model, batch))
    shutil.copytree(tmp_path / "saved", tmp_path / "copy")
    assert digest_model(tmp_path / "copy") == digest_model(tmp_path / "saved")


@pytest.mark.parametrize(
    ("method", "data", "weight", "mode"),
    [
        ({"name": "npo", "retain_npo_weight": 1.0}, "harmful", 0.0, "lora"),  # reference NLLs
        ({"name": "dpo"}, "harmful", 0.0, "full"),  # and two answers to one question
        ({"name": "kl"}, "safe_eraser", 0.5, "full"),  # reference logits
        ({"name": "rmu", "layer": 0}, "safe_eraser", 0.5, "full"),  # hidden states, question and answer in one turn
        ({"name": "rr", "layers": [0, 1]}, "harmful", 0.0, "lora"),  # hidden states of several layers and both sets
        ({"name": "po"}, "safe_eraser", 0.5, "lora"),  # no reference
    ],
    ids=["npo", "dpo", "kl+pd", "rmu+pd", "rr", "po+pd"],
)
def test_it_trains(
    loaded: Loaded,
    training_sets: dict[str, Path],
    tmp_path: Path,
    method: dict[str, object],
    data: str,
    weight: float,
    mode: str,
) -> None:
    run = recipe(
        loaded.folder,
        training_sets[data],
        tmp_path / "run",
        method,
        prompt_decouple_weight=weight,
        trainable={"mode": mode, "projector": True},
        training={"max_steps": 2, "per_device_train_batch_size": 2, "gradient_checkpointing": True},
    )
    model, processor = load_run_model(run_recipe(run), "fp32")
    assert type(processor).__name__ == type(loaded.processor).__name__
    layout = layout_of(loaded.model)
    before = dict(loaded.model.named_parameters())
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert any(name.startswith(layout.layers) for name in changed)
    assert any(is_projector(name, layout) for name in changed)
    assert not any(is_vision(name, layout) for name in changed)


def test_a_sine_projector_is_merged(loaded: Loaded, training_sets: dict[str, Path], tmp_path: Path) -> None:
    """Also where the projector is one matrix, which PEFT's wrapper passes on as its own."""
    trainable = {"mode": "lora", "projector": "sine", "lora": {"r": 2, "target_modules": ["q_proj"]}}
    run = recipe(
        loaded.folder, training_sets["harmful"], tmp_path / "run", "npo", trainable=trainable, training={"max_steps": 2}
    )
    model, _ = load_run_model(run_recipe(run), "fp32")
    layout, before = layout_of(loaded.model), dict(loaded.model.named_parameters())
    assert dict(model.named_parameters()).keys() == before.keys()
    assert any(
        is_projector(name, layout) and not torch.equal(value, before[name]) for name, value in model.named_parameters()
    )


def test_one_pass_for_all_roles_changes_nothing(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Roles whose images and texts differ in size give the same likelihoods, logits and hidden states joined as one by one."""
    turns = {}
    for role, sizes in (("forget", [(64, 48), (30, 70)]), ("retain", [(20, 20), (64, 64)])):
        turns[role] = []
        for number, (width, height) in enumerate(sizes):
            file = tmp_path / f"{role}{number}.png"
            Image.new("RGB", (width, height), (90 * number, 120, 30)).save(file)
            question = "what is this ?" if role == "forget" else "what is this , and what is that beside it ?"
            turns[role].append(Turn(f"{role}{number}", file, question, "a cat ." * (number + 1)))
    batches: Any = {role: encode_with_labels(loaded.processor, found, 2048) for role, found in turns.items()}
    batches["text"] = encode_with_labels(loaded.processor, [Turn("text", None, "what is this ?", "a dog .")], 2048)
    method = build_method(MethodConfig.model_validate({"name": "rr", "layers": [0]}), 0.0)
    loaded.model.eval()
    with torch.no_grad():
        joined = ModelStep(loaded.model, batches, method, None)
        ways = [(joined.nll(role), joined.hidden(role, 0), joined.cross_entropy(role)) for role in batches]
        monkeypatch.setattr("vlm_unlearn.training.step.can_merge", lambda batches: False)
        alone = ModelStep(loaded.model, batches, method, None)
        for role, (nll, hidden, ce) in zip(batches, ways, strict=True):
            torch.testing.assert_close(alone.nll(role), nll, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(alone.cross_entropy(role), ce, atol=1e-4, rtol=1e-4)
            real = batches[role]["attention_mask"].bool()
            torch.testing.assert_close(alone.hidden(role, 0)[real], hidden[real], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_tied_weights_are_not_missing(family: str, tmp_path: Path) -> None:
    families.build(family, tmp_path / "tied", tied=True)
    model: Any = load_model(tmp_path / "tied", "fp32")
    if family != "mllama":  # its embeddings have eight rows more than its head: transformers never ties them
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "again")
    again: Any = load_model(tmp_path / "again", "fp32")
    assert torch.equal(again.get_output_embeddings().weight, model.get_output_embeddings().weight)


@pytest.mark.parametrize("family", WITH_VIDEOS)
@pytest.mark.parametrize("style", ["own file", "nested", "none"])
def test_the_video_processor_is_saved_as_it_was_found(family: str, style: str, tmp_path: Path) -> None:
    families.build(family, tmp_path / "hub")
    own, nested = tmp_path / "hub" / "video_preprocessor_config.json", tmp_path / "hub" / "processor_config.json"
    found = json.loads(own.read_text())
    if style != "own file":
        own.unlink()
    if style == "nested":
        nested.write_text(json.dumps(json.loads(nested.read_text()) | {"video_processor": found}))
    if style == "none":
        found = json.loads(
            (tmp_path / "hub" / "preprocessor_config.json").read_text()
        )  # what transformers falls back to
    for start, end in (("hub", "once"), ("once", "twice")):
        load_processor(tmp_path / start).save_pretrained(tmp_path / end)
        saved = json.loads((tmp_path / end / "processor_config.json").read_text())
        assert saved["processor_class"] == type(load_processor(tmp_path / "hub")).__name__
        assert saved["video_processor"] == found


@pytest.mark.parametrize("family", WITH_VIDEOS)
def test_with_torchvision_the_class_is_plain(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision can't be installed here: what would be called is looked at instead."""
    from transformers import AutoProcessor

    from vlm_unlearn.models import processors

    families.build(family, tmp_path)
    stand_in = load_processor(tmp_path)
    calls: list[dict[str, object]] = []

    def from_pretrained(folder: str, **arguments: object) -> Processor:
        calls.append({"folder": folder, **arguments})
        return stand_in

    monkeypatch.setattr(processors, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", from_pretrained)
    processor = load_processor(tmp_path)
    assert calls == [
        {"folder": str(tmp_path), "trust_remote_code": False}
    ]  # no backend: "pil" would be refused for the video processor
    assert type(processor.image_processor).__name__.endswith("Pil")


@pytest.mark.parametrize("placeholder", ["<video>", "<IMG_CONTEXT>"])
def test_a_placeholder_in_a_text_is_refused(placeholder: str, images: Path, tmp_path: Path) -> None:
    families.build("internvl", tmp_path)
    turn = Turn("x", images / "wide.png", f"What of {placeholder}?", "A cat.")
    with raises_code("placeholder-in-text", record='"x"'):
        encode(load_processor(tmp_path), [turn], "right")


@pytest.mark.parametrize(
    "change", [{"text_config": None}, {"text_config": {"model_type": "llama"}}, {"vision_config": None}]
)
def test_a_configuration_far_larger_than_its_weights_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    families.build("llava", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    for load in (model_skeleton, lambda folder: load_model(folder, "fp32")):
        with pytest.raises(
            UserError, match=r"its config\.json describes [\d,]+ weights, its files hold \d{2},\d{3}; look whether"
        ):
            load(tmp_path)
