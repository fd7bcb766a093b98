"""Packed sequences give what separate ones give: loss, hidden states and gradients."""

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
from vlm_unlearn.models.layout import LAYOUTS
from vlm_unlearn.models.loader import load_model, load_processor, model_skeleton
from vlm_unlearn.models.trainable import prepare_trainable
from vlm_unlearn.training.forward import forward, packing_of
from vlm_unlearn.training.packing import NO_IMAGE, find_packing, prefix_sharing_unsupported_reason
from vlm_unlearn.training.references import AdapterReference
from vlm_unlearn.training.shared_attention import shared_attention
from vlm_unlearn.training.step import ModelStep

PACKING = [family for family, layout in LAYOUTS.items() if layout.supports_prefix_sharing]
QUESTIONS = [
    ("what is this ?", "a cat ."),
    ("what is this , and what is that beside it ?", "a dog and a bird ."),
    ("what is this ?", "a cat . it sleeps"),  # the same question, and the answer begins alike
    ("who is there ?", "nobody"),
]


@pytest.fixture(scope="module", params=PACKING)
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
    """Forget questions on two images in turn, retain questions on the first, decouple questions on a third."""
    asked: dict[Role, list[int]] = {"forget": [0, 1, 0, 1], "retain": [0, 0, 0], "decouple": [2, 2]}
    found: dict[Role, Batch] = {}
    for role, places in asked.items():
        if role not in method.roles:
            continue
        turns = [Turn(f"{role}{n}", images[place], *QUESTIONS[(n + place) % 4]) for n, place in enumerate(places)]
        one_turn = role == "forget" and method.append_answer_to_prompt
        whole = [Turn(turn.id, turn.image, f"{turn.question} {turn.answer}", None) for turn in turns]
        found[role] = encode(processor, whole, "right") if one_turn else encode_with_labels(processor, turns, 2048)
        found[role]["images"] = torch.tensor(places)
    return found


def step_of(
    model: Any, batches: dict[Role, Batch], method: Any, pack: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a step and the gradients it leaves."""
    model.zero_grad()
    given = (
        batches
        if pack
        else {role: {k: v for k, v in batch.items() if k != "images"} for role, batch in batches.items()}
    )
    step = ModelStep(model, given, method, AdapterReference())
    loss = method.loss(step).total
    loss.backward()
    return loss.detach(), {
        name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"name": "npo"}, {"name": "kl"}, {"name": "rmu", "layer": 0}, {"name": "undial"}],
    ids=lambda options: options["name"],
)
def test_packed_is_separate(folder: Path, images: list[Path], options: dict[str, Any], checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = load_model(folder, "fp32")
    with torch.no_grad():  # weights this wide make losses in the thousands, of which float32 keeps few digits
        for parameter in model.parameters():
            parameter.mul_(0.25)
    model = prepare_trainable(model, TrainableConfig.model_validate({"mode": "lora", "lora": {"r": 2}}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    method = build_method(MethodConfig.model_validate(options), 0.5)
    method.prepare(32, 2, torch.Generator().manual_seed(0))
    given = batches(load_processor(folder), images, method)
    separate, packed = (step_of(model, given, method, pack) for pack in (False, True))
    torch.testing.assert_close(packed[0], separate[0], atol=1e-5, rtol=1e-5)
    assert packed[1].keys() == separate[1].keys()
    for name, gradient in separate[1].items():
        torch.testing.assert_close(
            packed[1][name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_an_image_is_run_once(folder: Path, images: list[Path]) -> None:
    model, processor = load_model(folder, "fp32").eval(), load_processor(folder)
    method = build_method(MethodConfig.model_validate({"name": "gd"}), 0.0)
    batch = batches(processor, images, method)["forget"]
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(tuple(inputs[0].shape))
    )
    with torch.no_grad():
        for pack in (False, True):
            forward(model, batch, packing=packing_of(model, batch, method) if pack else None)
    hook.remove()
    separate, packed = (rows * width for rows, width in seen)
    assert seen[0][0] == 4
    assert seen[1][0] == 1
    assert packed < 0.75 * separate


def test_what_can_be_packed() -> None:
    """9 is the image's token: rows 0, 2 and 5 share image 5, rows 1 and 3 share 6 but the text before it differs, row 4 has none."""
    rows = [[1, 9, 9, 9, 9, 2, 3], [1, 9, 4], [1, 9, 9, 9, 9, 2, 4, 6], [7, 9, 4], [1, 2], [1, 9, 9, 9, 9, 2, 5]]
    ids = torch.tensor([row + [0] * (8 - len(row)) for row in rows])
    real = ids != 0
    packing = find_packing(ids, real, torch.tensor([5, 6, 5, 6, NO_IMAGE, 5]), 9)
    assert packing is not None
    assert packing.segment.tolist() == [[0] * 10 + [1] * 3 + [2] * 3 + [3] * 2, [0] * 6 + [1, 2, 2, 3] + [0] * 8]
    assert packing.first.tolist() == [0, 1, 3, 4]
    packed = packing.pack(ids, real)
    assert packed.tolist() == [[1, 9, 9, 9, 9, 2, 3, 4, 6, 5, 1, 9, 4, 7, 9, 4, 1, 2]]
    assert packing.unpack(packed)[real].equal(ids[real])
    assert (
        find_packing(ids[:, :7], real[:, :7], torch.tensor([5, 6, 7, 8, NO_IMAGE, 4]), 9) is not None
    )  # without padding, at least
    assert find_packing(ids[[0, 2]][:, :7], real[[0, 2]][:, :7], torch.tensor([5, 7]), 9) is None


def test_what_sees_what() -> None:
    """By its parts and by FlexAttention's mask, a position sees what comes before it on its beginning, and of its own rest."""
    ids = torch.tensor([[1, 9, 2, 3, 0], [1, 9, 2, 4, 5], [1, 8, 0, 0, 0]])
    packing = find_packing(ids, ids != 0, torch.tensor([5, 5, NO_IMAGE]), 9)
    assert packing is not None
    place = torch.arange(packing.segment.shape[1])
    seen = packing.block_mask().mask_mod(torch.tensor(0), torch.tensor(0), place[:, None], place)
    own = {3: [3], 4: [4], 5: [4, 5]}
    assert {by: row.nonzero()[:, 0].tolist() for by, row in enumerate(seen)} == {
        **{by: list(range(by + 1)) for by in range(3)},
        **{by: [0, 1, 2, *rest] for by, rest in own.items()},
        6: [6],
        7: [6, 7],
    }
    heads, width = 2, 4
    query, key, value = torch.randn(3, 1, heads, len(place), width, generator=torch.Generator().manual_seed(0))
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2)
    found, _ = shared_attention(nn.Module(), query, key, value, None, parts=packing.parts)
    torch.testing.assert_close(found, wanted)
    module = nn.Module()
    module.num_key_value_groups = 2  # one head of keys for both of queries
    few, _ = shared_attention(module, query, key[:, :1], value[:, :1], None, parts=packing.parts)
    many, _ = shared_attention(nn.Module(), query, key[:, [0, 0]], value[:, [0, 0]], None, parts=packing.parts)
    assert few.equal(many)


def test_who_does_not_share_images_says_so(folder: Path) -> None:
    npo, paper = (
        build_method(MethodConfig.model_validate({"name": name, "paper_compat": True}), 0.5) for name in ("npo", "kl")
    )
    assert prefix_sharing_unsupported_reason(model_skeleton(folder), npo, "sdpa") is None
    for attention in ("eager", "flash_attention_2"):
        assert prefix_sharing_unsupported_reason(model_skeleton(folder), npo, attention) == f"not with {attention}"
    assert (
        prefix_sharing_unsupported_reason(model_skeleton(folder), paper, "sdpa")
        == "not with paper: true, which counts padding"
    )


def test_a_sliding_window_is_not_packed_over(folder: Path, images: list[Path]) -> None:
    method = build_method(MethodConfig.model_validate({"name": "gd"}), 0.0)
    model, batch = load_model(folder, "fp32"), batches(load_processor(folder), images, method)["retain"]
    assert packing_of(model, batch, method) is not None
    model.config.get_text_config().sliding_window = batch["input_ids"].shape[1] - 1
    assert packing_of(model, batch, method) is None


def test_other_families_run_each_question(tmp_path: Path) -> None:
    families.build("idefics3", tmp_path)
    method = build_method(MethodConfig.model_validate({"name": "npo"}), 0.0)
    assert (
        prefix_sharing_unsupported_reason(model_skeleton(tmp_path), method, "sdpa")
        == "not with models of the family idefics3"
    )
