"""Every supported model family: labels, padding, gradients, training, generation and saving."""

from __future__ import annotations

import copy
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
from vlm_unlearn.config import GenerationConfig, MethodConfig, TrainableConfig
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.encoding import IGNORED, Batch, PromptMeter, Turn, encode, encode_with_labels
from vlm_unlearn.data.processor_call import Processor
from vlm_unlearn.generation.hf import generate_responses
from vlm_unlearn.methods import build_method
from vlm_unlearn.modeling.forward import forward
from vlm_unlearn.modeling.loader import load_model, load_processor, load_run_model, model_skeleton
from vlm_unlearn.modeling.structure import find_structure
from vlm_unlearn.modeling.trainable import prepare_trainable
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.records import Prompt
from vlm_unlearn.store import digest_model
from vlm_unlearn.training.passes import Passes
from vlm_unlearn.training.references import FrozenCopyReference
from vlm_unlearn.training.runner import run_recipe
from vlm_unlearn.training.step import ModelStep
from vlm_unlearn.training.stream import UnlearningCollator, UnlearningStream

LENGTH = 512
END_TOKENS = {"llava": "</s>", "llava_next": "</s>", "mllama": "<|eot_id|>", "gemma3": "<end_of_turn>"} | {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl"), "<|im_end|>"),
    **dict.fromkeys(("pixtral", "mistral3", "instructblip"), "</s>"),
    "paligemma": "<eos>",
    **dict.fromkeys(("idefics3", "smolvlm"), "<end_of_utterance>"),
}

NEEDS_IMAGE = ("paligemma", "instructblip")


class Loaded:
    """A tiny model of a family in eval mode, with its processor and folder."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family = family
        self.folder = folder
        self.model: Any = load_model(folder, "fp32").eval()
        self.processor: Processor = load_processor(folder)

    def nll(self, turns: Sequence[Turn], side: str = "right") -> torch.Tensor:
        """Returns the summed answer NLL of each turn, [B], as training computes it."""
        return answer_nll(self.model, encode_padded(self.processor, turns, side))


def answer_nll(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return forward(VisionLanguageModel(model), batch).answer_nll[0]


def encode_padded(processor: Processor, turns: Sequence[Turn], side: str) -> Batch:
    """Encodes turns with labels, padded on the given side."""
    right = encode_with_labels(processor, turns, LENGTH)
    if side == "right":
        return right
    batch = encode(processor, turns, "left")
    batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
    for row, length in enumerate(right["attention_mask"].sum(dim=1).tolist()):
        batch["labels"][row, -length:] = right["labels"][row, :length]
    return batch


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Concatenates batches along dim 0. Smaller tensors are padded at their ends with zeros (labels: ignored)."""
    result: Batch = {}
    for key in dict.fromkeys(key for batch in batches for key in batch):
        tensors = [batch[key] for batch in batches if key in batch]
        shape = [max(tensor.shape[axis] for tensor in tensors) for axis in range(1, tensors[0].dim())]
        padded = [tensor.new_full((len(tensor), *shape), IGNORED if key == "labels" else 0) for tensor in tensors]
        for target, tensor in zip(padded, tensors, strict=True):
            target[tuple(slice(size) for size in tensor.shape)] = tensor
        result[key] = torch.cat(padded)
    return result


@pytest.fixture(scope="session", params=list(families.FAMILIES))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded(request.param, families.shared_folder(request.param, tmp_path_factory))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in three shapes around three colors: wide, high and square."""
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


def test_layout_covers_all_parameters(loaded: Loaded) -> None:
    structure = find_structure(loaded.model)
    names: dict[str, list[str]] = {"vision": [], "projector": [], "layers": [], "remaining": []}
    for name, _ in loaded.model.named_parameters():
        belongs_to = {
            "vision": structure.component(name) == "vision tower",
            "projector": structure.component(name) == "projector",
            "layers": name.startswith(structure.layers + "."),
        }
        assert sum(belongs_to.values()) <= 1
        names[next((component for component, belongs in belongs_to.items() if belongs), "remaining")].append(name)
    assert all(names.values())
    assert {".".join(name.split(".")[-2:]) for name in names["remaining"]} <= {
        *("embed_tokens.weight", "norm.weight", "lm_head.weight"),
        "model.image_newline",  # the learned end of an image row in llava_next and llava_onevision
    }
    assert len(VisionLanguageModel(loaded.model).decoder_layers) == (3 if loaded.family == "mllama" else 2)
    skeleton = model_skeleton(loaded.folder)
    assert len(VisionLanguageModel(skeleton).decoder_layers) == len(VisionLanguageModel(loaded.model).decoder_layers)
    assert [name for name, _ in skeleton.named_parameters()] == [name for name, _ in loaded.model.named_parameters()]


def test_labels_cover_answers_and_end_tokens(loaded: Loaded, turns: list[Turn]) -> None:
    batch = encode_with_labels(loaded.processor, turns, LENGTH)
    lengths = batch["attention_mask"].sum(dim=1)
    assert len(set(lengths.tolist())) == 3
    for row, (turn, length) in enumerate(zip(turns, lengths.tolist(), strict=True)):
        assert batch["attention_mask"][row, :length].all()  # padding is on the right
        labels = batch["labels"][row]
        labeled = labels != IGNORED
        assert (labels[labeled] == batch["input_ids"][row][labeled]).all()
        spans = "".join("x" if is_labeled else " " for is_labeled in labeled).split()
        answers = [answer for _, answer in turn.history] + [turn.answer]
        assert len(spans) == len(answers)
        words = loaded.processor.tokenizer.decode(labels[labeled]).split(END_TOKENS[loaded.family])
        assert [word.strip() for word in words] == [*answers, ""]


def test_encode_truncates_long_answer(loaded: Loaded, turns: list[Turn]) -> None:
    complete = encode_with_labels(loaded.processor, turns, LENGTH)
    width = int((complete["labels"][0] != IGNORED).nonzero()[0]) + 3
    truncated = encode_with_labels(loaded.processor, turns[:1], width)
    assert truncated["input_ids"].shape == (1, width)
    assert (truncated["labels"] != IGNORED).sum() == 3
    assert answer_nll(loaded.model, truncated).isfinite().all()


def test_prompt_meter_counts_image_tokens(loaded: Loaded, turns: list[Turn]) -> None:
    meter = PromptMeter(loaded.processor)
    for turn in [*turns, *([] if loaded.family in NEEDS_IMAGE else [TEXT_ONLY])]:
        assert meter.total_tokens(turn) == encode_with_labels(loaded.processor, [turn], LENGTH)["input_ids"].shape[1]


def test_nll_does_not_depend_on_batch_and_padding(loaded: Loaded, turns: list[Turn], images: Path) -> None:
    single = torch.cat([loaded.nll([turn]) for turn in turns])
    torch.testing.assert_close(loaded.nll(turns), single, atol=1e-4, rtol=0)
    torch.testing.assert_close(loaded.nll(turns[::-1]), single.flip(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(loaded.nll(turns, "left"), single, atol=1e-4, rtol=0)
    # If the model ignored images, this test could not detect images of the wrong row.
    other_image = Turn("other", images / "square.png", turns[0].question, turns[0].answer)
    assert (loaded.nll([other_image]) - single[0]).abs() > 3e-2


def test_logits_to_keep_selects_columns(loaded: Loaded, turns: list[Turn]) -> None:
    batch = encode_with_labels(loaded.processor, turns, LENGTH)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    columns = torch.tensor([5, 9, batch["input_ids"].shape[1] - 1])
    with torch.no_grad():
        selected = loaded.model(**inputs, logits_to_keep=columns).logits
        torch.testing.assert_close(selected, loaded.model(**inputs).logits[:, columns], atol=1e-4, rtol=0)


def test_concatenated_batches_keep_nll(loaded: Loaded, turns: list[Turn]) -> None:
    single = torch.cat([loaded.nll([turn]) for turn in turns])
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        first, *others = [turns[index] for index in order]
        batch = concatenate([encode_with_labels(loaded.processor, group, LENGTH) for group in ([first], others)])
        torch.testing.assert_close(answer_nll(loaded.model, batch), single[order], atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_text_without_image_in_batch_with_images(loaded: Loaded, turns: list[Turn], side: str) -> None:
    if loaded.family in NEEDS_IMAGE:
        with raises_code("unsupported-setting", record='"text"') as caught:
            loaded.nll([TEXT_ONLY], side)
        assert type(loaded.processor).__name__ in str(caught.value)
        return
    single = loaded.nll([TEXT_ONLY])
    assert single.isfinite().all()
    texts = [TEXT_ONLY, Turn("t", None, "Why?", "So it is, so it is.")]
    torch.testing.assert_close(loaded.nll(texts, side)[:1], single, atol=1e-4, rtol=0)
    mixed = [turns[0], TEXT_ONLY, turns[1]]
    if loaded.family == "mllama":
        with raises_code("unsupported-setting", record='"text"') as caught:
            loaded.nll(mixed, side)
        assert "MllamaProcessor" in str(caught.value)
        return
    singles = torch.cat([loaded.nll([turn]) for turn in mixed])
    torch.testing.assert_close(loaded.nll(mixed, side), singles, atol=1e-4, rtol=0)
    batch = concatenate([encode_with_labels(loaded.processor, group, LENGTH) for group in ([TEXT_ONLY], [turns[0]])])
    torch.testing.assert_close(answer_nll(loaded.model, batch), singles[[1, 0]], atol=1e-4, rtol=0)


def test_gradients_reach_every_component(loaded: Loaded, turns: list[Turn]) -> None:
    loaded.model.train()
    nll_sum, _ = forward(
        VisionLanguageModel(loaded.model), encode_with_labels(loaded.processor, turns, LENGTH)
    ).answer_nll
    nll_sum.sum().backward()
    structure = find_structure(loaded.model)
    names = names_with_gradient(loaded.model)
    loaded.model.zero_grad(set_to_none=True)
    loaded.model.eval()
    for layer in range(len(VisionLanguageModel(loaded.model).decoder_layers)):
        assert any(name.startswith(f"{structure.layers}.{layer}.") for name in names)
    assert any(structure.component(name) == "projector" for name in names)
    assert any(structure.component(name) == "vision tower" for name in names)


def names_with_gradient(model: Any) -> set[str]:
    return {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}


def test_generation_does_not_depend_on_batch(loaded: Loaded, images: Path) -> None:
    questions = [
        ("wide", "What?"),
        ("high", "And what is this, in a few words?"),
        (None, "Say it now."),
        ("square", "Tell me of it."),
    ]
    if loaded.family in NEEDS_IMAGE:
        questions[2] = ("wide", "Say it now.")
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

    def texts(batch_size: int) -> dict[str, str | None]:
        config = GenerationConfig(max_new_tokens=6, batch_size=batch_size)
        batches = generate_responses(loaded.model, loaded.processor, prompts, {"s": images}, config)
        return {response.prompt_id: response.text for batch in batches for response in batch}

    batched = texts(4)
    assert set(batched) == {"0", "1", "2", "3"}
    assert any(batched.values())
    assert batched == texts(1)


def test_saved_and_loaded_model_is_bitwise_the_same(loaded: Loaded, turns: list[Turn], tmp_path: Path) -> None:
    digest = digest_model(loaded.folder)
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.processor.save_pretrained(tmp_path / "saved")
    assert digest_model(loaded.folder) == digest
    reloaded = Loaded(loaded.family, tmp_path / "saved")
    batch = encode_with_labels(loaded.processor, turns, LENGTH)
    reloaded_batch = encode_with_labels(reloaded.processor, turns, LENGTH)
    assert set(batch) == set(reloaded_batch)
    assert all(torch.equal(batch[key], reloaded_batch[key]) for key in batch)
    assert torch.equal(answer_nll(reloaded.model, reloaded_batch), answer_nll(loaded.model, batch))
    shutil.copytree(tmp_path / "saved", tmp_path / "copy")
    assert digest_model(tmp_path / "copy") == digest_model(tmp_path / "saved")


STEP_METHODS: dict[str, tuple[dict[str, object], str, float]] = {
    "dpo": ({"name": "dpo"}, "harmful", 0.0),  # reference NLLs, and two answers to one question
    "kl+pd": ({"name": "kl"}, "safe_eraser", 0.5),  # reference logits
    "rmu+pd": ({"name": "rmu", "layer": 0}, "safe_eraser", 0.5),  # hidden states, question and answer in one turn
    "rr": ({"name": "rr", "layers": [0, 1]}, "harmful", 0.0),  # hidden states of several layers and both sets
    "po+pd": ({"name": "po"}, "safe_eraser", 0.5),  # no reference
}
# In test-fast, two families run all methods: the layers of mllama differ most from those of llava. The other families
# run one method with two forward passes and one with hidden states.
ALL_METHODS_FAMILIES, FAST_METHODS = ("llava", "mllama"), ("kl+pd", "rr")


@pytest.mark.parametrize(
    ("loaded", "method", "data", "decouple_weight"),
    [
        pytest.param(
            family,
            *settings,
            id=f"{family}-{name}",
            marks=() if family in ALL_METHODS_FAMILIES or name in FAST_METHODS else pytest.mark.slow,
        )
        for family in families.FAMILIES
        for name, settings in STEP_METHODS.items()
    ],
    indirect=["loaded"],
)
def test_step_of_method_reaches_layers_and_projector(
    loaded: Loaded, training_sets: dict[str, Path], method: dict[str, object], data: str, decouple_weight: float
) -> None:
    """One training step, with gradient checkpointing as in a real run."""
    model = prepare_trainable(VisionLanguageModel(copy.deepcopy(loaded.model)), TrainableConfig(projector=True)).model
    structure = find_structure(model)
    reference = FrozenCopyReference(model)
    with torch.no_grad():  # away from the reference, where some losses have no gradient
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.01)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    unlearning = build_method(MethodConfig.model_validate(method), decouple_weight)
    unlearning.prepare(families.WIDTH, len(VisionLanguageModel(model).decoder_layers), torch.Generator().manual_seed(0))
    training_set = UnlearningDataset.from_folder(training_sets[data])
    stream = UnlearningStream(training_set, unlearning, 2, seed=0)
    batches: Any = UnlearningCollator(loaded.processor, training_set, unlearning, LENGTH)([stream[0], stream[1]])
    loss = unlearning.loss(ModelStep(Passes(VisionLanguageModel(model), [batches], unlearning, reference))).total
    loss.backward()
    names = names_with_gradient(model)
    assert loss.isfinite()
    assert any(name.startswith(structure.layers) for name in names)
    assert any(structure.component(name) == "projector" for name in names)
    assert not any(structure.component(name) == "vision tower" for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("projector", [True, "sine"])
def test_lora_run_trains_and_merges_layers_and_projector(
    loaded: Loaded, training_sets: dict[str, Path], tmp_path: Path, projector: bool | str
) -> None:
    """Some projectors are one matrix, whose attributes PEFT's wrapper passes on as its own."""
    run = recipe(
        loaded.folder,
        training_sets["harmful"],
        tmp_path / "run",
        {"name": "npo", "retain_npo_weight": 1.0},
        trainable={"mode": "lora", "projector": projector},
        training={"max_steps": 2, "per_device_train_batch_size": 2, "gradient_checkpointing": True},
    )
    model, processor = load_run_model(run_recipe(run), "fp32")
    assert type(processor).__name__ == type(loaded.processor).__name__
    structure, original = find_structure(loaded.model), dict(loaded.model.named_parameters())
    assert dict(model.named_parameters()).keys() == original.keys()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, original[name])}
    assert any(name.startswith(structure.layers) for name in changed)
    assert any(structure.component(name) == "projector" for name in changed)
    assert not any(structure.component(name) == "vision tower" for name in changed)


def test_joined_roles_give_same_values_as_separate_roles(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images and texts of the roles differ in size. NLLs, losses and hidden states must not depend on joining."""
    turns = {}
    for role, sizes in (("forget", [(64, 48), (30, 70)]), ("retain", [(20, 20), (64, 64)])):
        turns[role] = []
        for number, (width, height) in enumerate(sizes):
            file = tmp_path / f"{role}{number}.png"
            Image.new("RGB", (width, height), (90 * number, 120, 30)).save(file)
            question = "what is this ?" if role == "forget" else "what is this , and what is that beside it ?"
            turns[role].append(Turn(f"{role}{number}", file, question, "a cat ." * (number + 1)))
    if loaded.family not in NEEDS_IMAGE:
        turns["text"] = [Turn("text", None, "what is this ?", "a dog .")]
    batches: Any = {role: encode_with_labels(loaded.processor, role_turns, 2048) for role, role_turns in turns.items()}
    method = build_method(MethodConfig.model_validate({"name": "rr", "layers": [0]}), 0.0)
    with torch.no_grad():
        joined = ModelStep(Passes(VisionLanguageModel(loaded.model), [batches], method, None))
        values = [(joined.nll(role), joined.hidden(role, 0), joined.cross_entropy(role)) for role in batches]
        separate = ModelStep(Passes(VisionLanguageModel(loaded.model), [batches], method, None, max_tokens=1))
        for role, (nll, hidden, cross_entropy) in zip(batches, values, strict=True):
            torch.testing.assert_close(separate.nll(role), nll, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(separate.cross_entropy(role), cross_entropy, atol=1e-4, rtol=1e-4)
            real = batches[role]["attention_mask"].bool()
            torch.testing.assert_close(separate.hidden(role, 0)[real], hidden[real], atol=1e-3, rtol=1e-3)
