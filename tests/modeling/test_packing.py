"""Packed sequences have the same loss and gradients as separate ones, and run each image once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import families
from vlm_unlearn.config import MethodConfig, TrainableConfig
from vlm_unlearn.data.encoding import Batch, Turn, encode, encode_with_labels
from vlm_unlearn.methods import Role, build_method
from vlm_unlearn.modeling import packing as packing_module
from vlm_unlearn.modeling.forward import forward
from vlm_unlearn.modeling.loader import load_model, load_processor, model_skeleton
from vlm_unlearn.modeling.packing import NO_IMAGE, find_packing, packing_of, prefix_sharing_unsupported_reason
from vlm_unlearn.modeling.shared_attention import (
    GroupedAttention,
    PackedAttention,
    SegmentedAttention,
    shared_attention,
)
from vlm_unlearn.modeling.structure import NEVER_SHARED_FAMILIES, PREFIX_SHARING_FAMILIES
from vlm_unlearn.modeling.trainable import prepare_trainable
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.training.passes import Passes
from vlm_unlearn.training.references import AdapterReference
from vlm_unlearn.training.step import ModelStep

FAMILIES = sorted({*PREFIX_SHARING_FAMILIES, "pixtral"})  # a llava with another vision tower
QUESTIONS = [
    ("what is this ?", "a cat ."),
    ("what is this , and what is that beside it ?", "a dog and a bird ."),
    ("what is this ?", "a cat . it sleeps"),  # the same question, and the answer begins alike
    ("who is there ?", "nobody"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    built: Path = tmp_path_factory.mktemp(request.param)
    families.build(request.param, built)
    return built


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    files = []
    for number, size in enumerate(((64, 48), (30, 70), (20, 20))):
        files.append(tmp_path_factory.mktemp("images") / f"{number}.png")
        Image.new("RGB", size, (90 * number, 120, 30)).save(files[-1])
    return files


def batches(processor: Any, images: list[Path], method: Any) -> dict[Role, Batch]:
    """Forget questions on two alternating images, retain questions on the first, decouple questions on a third."""
    image_numbers: dict[Role, list[int]] = {"forget": [0, 1, 0, 1], "retain": [0, 0, 0], "decouple": [2, 2]}
    encoded: dict[Role, Batch] = {}
    for role, numbers in image_numbers.items():
        if role not in method.requirements.roles:
            continue
        turns = [Turn(f"{role}{n}", images[number], *QUESTIONS[(n + number) % 4]) for n, number in enumerate(numbers)]
        if role == "forget" and method.append_answer_to_prompt:
            prompts = [Turn(turn.id, turn.image, f"{turn.question} {turn.answer}", None) for turn in turns]
            encoded[role] = encode(processor, prompts, "right")
        else:
            encoded[role] = encode_with_labels(processor, turns, 2048)
        encoded[role]["images"] = torch.tensor(numbers)
    return encoded


def step_of(
    model: Any, batches: dict[Role, Batch], method: Any, pack: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the loss of a step and its gradients."""
    model.zero_grad()
    if not pack:
        batches = {role: {k: v for k, v in batch.items() if k != "images"} for role, batch in batches.items()}
    step = ModelStep(Passes(VisionLanguageModel(model), [batches], method, AdapterReference()))
    loss = method.loss(step).total
    loss.backward()
    return loss.detach(), {
        name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None
    }


@pytest.mark.parametrize(
    ("kind", "options", "checkpointing"),
    [
        *(
            (SegmentedAttention, options, checkpointing)
            for options in ({"name": "npo"}, {"name": "kl"}, {"name": "rmu", "layer": 0}, {"name": "undial"})
            for checkpointing in (False, True)
        ),
        (GroupedAttention, {"name": "npo"}, False),
        (GroupedAttention, {"name": "kl"}, True),
        # Padding has a part in the loss.
        *(
            (kind, {**options, "paper_compat": True}, False)
            for options in ({"name": "kl"}, {"name": "rmu", "layer": 0})
            for kind in (SegmentedAttention, GroupedAttention)
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None) or (value["name"] if isinstance(value, dict) else str(value)),
)
def test_packed_step_has_the_loss_and_gradients_of_separate_questions(
    folder: Path,
    images: list[Path],
    kind: type[PackedAttention],
    options: dict[str, Any],
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing_module, "describe_packed_sequence", lambda segments, _device: kind.build(segments))
    torch.manual_seed(0)
    model = load_model(folder, "fp32")
    with torch.no_grad():  # otherwise the losses are in the thousands, with few float32 digits after the point
        for parameter in model.parameters():
            parameter.mul_(0.25)
    model = prepare_trainable(
        VisionLanguageModel(model), TrainableConfig.model_validate({"mode": "lora", "lora": {"r": 2}})
    ).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    method = build_method(MethodConfig.model_validate(options), 0.5)
    method.prepare(32, 2, torch.Generator().manual_seed(0))
    encoded = batches(load_processor(folder), images, method)
    separate, packed = (step_of(model, encoded, method, pack) for pack in (False, True))
    torch.testing.assert_close(packed[0], separate[0], atol=1e-5, rtol=1e-5)
    assert packed[1].keys() == separate[1].keys()
    for name, gradient in separate[1].items():
        torch.testing.assert_close(
            packed[1][name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_packed_forward_runs_a_shared_image_once(folder: Path, images: list[Path]) -> None:
    model, processor = load_model(folder, "fp32").eval(), load_processor(folder)
    method = build_method(MethodConfig.model_validate({"name": "gd"}), 0.0)
    batch = batches(processor, images, method)["forget"]
    shapes = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(inputs[0].shape))
    )
    with torch.no_grad():
        for pack in (False, True):
            forward(
                VisionLanguageModel(model),
                batch,
                packing=packing_of(VisionLanguageModel(model), batch) if pack else None,
            )
    hook.remove()
    separate, packed = (rows * width for rows, width in shapes)
    assert shapes[0][0] == 4
    assert shapes[1][0] == 1
    assert packed < 0.75 * separate


def test_find_packing_shares_common_prefixes_of_rows_on_one_image() -> None:
    """The image token is 9. Rows 0, 2 and 5 share image 5. Rows 1 and 3 have image 6, but different text before it."""
    rows = [[1, 9, 9, 9, 9, 2, 3], [1, 9, 4], [1, 9, 9, 9, 9, 2, 4, 6], [7, 9, 4], [1, 2], [1, 9, 9, 9, 9, 2, 5]]
    ids = torch.tensor([row + [0] * (8 - len(row)) for row in rows])
    is_token = ids != 0
    packing = find_packing(ids, is_token, torch.tensor([5, 6, 5, 6, NO_IMAGE, 5]), 9)
    assert packing is not None
    assert packing.segments.prefix.tolist() == [0] * 10 + [1] * 3 + [2] * 3 + [3] * 2
    assert packing.segments.suffix.tolist() == [0] * 6 + [1, 2, 2, 3] + [0] * 8
    assert packing.image_rows.tolist() == [0, 1, 3, 4]
    packed = packing.pack(ids)
    assert packed.tolist() == [[1, 9, 9, 9, 9, 2, 3, 4, 6, 5, 1, 9, 4, 7, 9, 4, 1, 2]]
    assert packing.unpack(packed)[is_token].equal(ids[is_token])


def test_find_packing_without_shared_images_packs_only_batches_with_much_padding() -> None:
    ids = torch.tensor([[1, 9, 9, 9, 9, 2, 3], [1, 9, 9, 9, 9, 2, 4], [1, 9, 4, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0]])
    is_token = ids != 0
    assert find_packing(ids, is_token, torch.tensor([5, 7, 8, NO_IMAGE]), 9) is not None
    assert find_packing(ids[:2], is_token[:2], torch.tensor([5, 7]), 9) is None


def test_common_start_of_all_rows_is_packed_once() -> None:
    """It ends at the first image, and leaves a token of the shortest row."""
    start = list(range(10, 20))
    rows = [[*start, 9, 2, 3, 4], [*start, 9, 2, 5], [*start, 1]]
    ids = torch.tensor([row + [0] * (14 - len(row)) for row in rows])
    packing = find_packing(ids, ids != 0, torch.tensor([5, 7, NO_IMAGE]), 9)
    assert packing is not None
    assert packing.segments.prefix.tolist() == [-1] * 10 + [0] * 4 + [1] * 3 + [2]
    assert packing.pack(ids).tolist() == [[*start, 9, 2, 3, 4, 9, 2, 5, 1]]
    packing = find_packing(ids[:, 3:], ids[:, 3:] != 0, torch.tensor([5, 7, NO_IMAGE]), 9)
    assert packing is not None  # because of its padding
    assert packing.segments.prefix.tolist()[0] == 0, "seven tokens are not worth it"


ROOT = list(range(20, 30))
PACKED_BATCHES: dict[str, tuple[list[list[int]], list[int], list[int] | None]] = {  # rows, images, widths
    "shared image": ([[1, 9, 2, 3], [1, 9, 2, 4, 5], [1, 8]], [5, 5, NO_IMAGE], None),
    "root": ([[*ROOT, 9, 2, 3], [*ROOT, 9, 2, 4, 5], [*ROOT, 8]], [5, 6, NO_IMAGE], None),
    "root and shared image": ([[*ROOT, 9, 2, 3], [*ROOT, 9, 2, 4, 5], [*ROOT, 9, 7]], [5, 5, 6], None),
    "root only": ([[*ROOT, 8, 2, 3], [*ROOT, 4], [*ROOT, 8]], [NO_IMAGE] * 3, None),
    "padding": ([[1, 9, 2, 3], [1, 9, 2, 4, 5, 6], [1, 9, 2, 7]], [5, 5, 6], [6, 6, 5]),
    "root and padding": ([[*ROOT, 9, 2, 3], [*ROOT, 9, 2, 4, 5], [*ROOT, 9, 7]], [5, 5, 6], [14, 14, 13]),
}


@pytest.mark.parametrize("kind", [SegmentedAttention, GroupedAttention])
@pytest.mark.parametrize("name", PACKED_BATCHES)
def test_packed_attention_equals_that_of_each_row(kind: type[PackedAttention], name: str) -> None:
    rows, images, widths = PACKED_BATCHES[name]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    is_token = ids != 0
    packing = find_packing(ids, is_token, torch.tensor(images), 9, widths)
    assert packing is not None
    size = len(packing.segments.prefix)
    # What each packed position attends to in its rows: the tokens up to its own position.
    expected_mask = torch.zeros(size, size, dtype=torch.bool)
    for row in range(len(rows)):
        for position in packing.is_packed[row].nonzero()[:, 0].tolist():
            tokens = [key for key in range(position + 1) if is_token[row, key]]
            expected_mask[packing.packed_index[row, position], packing.packed_index[row, tokens]] = True
    index = torch.arange(size)
    mask = packing.block_mask().mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index)
    assert mask.equal(expected_mask)

    inputs = torch.randn(3, 1, 2, size, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    query, key, value = inputs
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=expected_mask).transpose(1, 2)
    packed = kind.build(packing.segments).to(torch.device("cpu"))
    attended, _ = shared_attention(nn.Module(), query, key, value, None, packed_attention=packed)
    torch.testing.assert_close(attended, expected)
    weights = torch.randn(attended.shape, generator=torch.Generator().manual_seed(1))
    gradient, expected_gradient = (
        torch.autograd.grad((output * weights).sum(), inputs, retain_graph=True)[0] for output in (attended, expected)
    )
    torch.testing.assert_close(gradient, expected_gradient)
    module = nn.Module()
    module.num_key_value_groups = 2  # two query heads per key head
    grouped, _ = shared_attention(module, query, key[:, :1], value[:, :1], None, packed_attention=packed)
    repeated, _ = shared_attention(nn.Module(), query, key[:, [0, 0]], value[:, [0, 0]], None, packed_attention=packed)
    assert grouped.equal(repeated)


def test_unsupported_attention_gives_the_reason(folder: Path) -> None:
    skeleton = VisionLanguageModel(model_skeleton(folder))
    assert prefix_sharing_unsupported_reason(skeleton, "sdpa") is None
    for attention in ("eager", "flash_attention_2"):
        assert attention in str(prefix_sharing_unsupported_reason(skeleton, attention))


def test_batch_longer_than_the_sliding_window_is_not_packed(folder: Path, images: list[Path]) -> None:
    method = build_method(MethodConfig.model_validate({"name": "gd"}), 0.0)
    model, batch = load_model(folder, "fp32"), batches(load_processor(folder), images, method)["retain"]
    assert packing_of(VisionLanguageModel(model), batch) is not None
    model.config.get_text_config().sliding_window = batch["input_ids"].shape[1] - 1
    assert packing_of(VisionLanguageModel(model), batch) is None


@pytest.mark.parametrize("family", sorted(NEVER_SHARED_FAMILIES))
def test_family_that_cannot_share_gives_the_reason(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    skeleton = VisionLanguageModel(model_skeleton(families.shared_folder(family, tmp_path_factory)))
    reason = str(prefix_sharing_unsupported_reason(skeleton, "sdpa"))
    assert family in reason
    assert NEVER_SHARED_FAMILIES[family] in reason
