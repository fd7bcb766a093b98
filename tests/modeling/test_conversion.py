"""Checkpoints of LLaVA's and SafeEraser's code have equal logits before and after their conversion."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from foreign_checkpoints import (
    IMAGE,
    IMAGE_SIZE,
    OriginalLlava,
    language_layers,
    random_lora,
    sentence_pieces,
    write_clip,
    write_language_model,
    write_llava,
    write_llava_lora,
)
from vlm_unlearn.modeling.conversion.base import ConversionOptions
from vlm_unlearn.modeling.conversion.run import convert
from vlm_unlearn.modeling.loader import load_model, load_processor

pytestmark = [pytest.mark.timeout(180), pytest.mark.multiprocess, pytest.mark.slow]
IDS = [1, 300, 265, IMAGE, 310, 280, 290, 275]
NUM_PATCHES = 4
VOCABULARY = len(sentence_pieces())


@pytest.fixture(scope="module")
def model() -> OriginalLlava:
    return OriginalLlava(VOCABULARY)


@pytest.fixture(scope="module")
def clip(model: OriginalLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip", model, pickled=False)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def converted_logits(folder: Path, pixels: torch.Tensor, rows: int = VOCABULARY) -> torch.Tensor:
    """The logits of the converted model, without those of added tokens."""
    model = load_model(folder, "fp32").eval()
    image = [model.config.image_token_id] * NUM_PATCHES
    position = IDS.index(IMAGE)
    ids = torch.tensor([[*IDS[:position], *image, *IDS[position + 1 :]]])
    logits: torch.Tensor = model(input_ids=ids, pixel_values=pixels[None]).logits[0]
    return logits[:, :rows]


@pytest.mark.parametrize(
    ("projector", "settings"),
    [
        ("mlp2x_gelu", {}),
        ("mlp2x_gelu", {"pickled": False}),
        ("mlp2x_gelu", {"shards": 1, "with_tower": False}),
        ("linear", {"pickled": False, "with_tower": False}),
    ],
)
def test_complete_model(projector: str, settings: dict[str, Any], pixels: torch.Tensor, tmp_path: Path) -> None:
    model = OriginalLlava(VOCABULARY, projector)
    source = write_llava(tmp_path / "source", model, **settings)
    clip = write_clip(tmp_path / "clip", model)
    out = convert(str(source), tmp_path / "out", ConversionOptions(vision_tower=str(clip)))
    torch.testing.assert_close(converted_logits(out, pixels), model(IDS, pixels), rtol=1e-5, atol=1e-5)
    auto = AutoModelForImageTextToText.from_pretrained(out)
    assert isinstance(auto, LlavaForConditionalGeneration)
    assert (auto.config.text_config.vocab_size, auto.config.image_token_id) == (384, VOCABULARY)


def test_lora_on_each_kind_of_base(model: OriginalLlava, clip: Path, pixels: torch.Tensor, tmp_path: Path) -> None:
    trained = copy.deepcopy(model)
    trained.projector = OriginalLlava(VOCABULARY, seed=7).projector
    adapter = write_llava_lora(tmp_path / "adapter", trained, model)
    expected = trained(IDS, pixels)
    assert (expected - model(IDS, pixels)).abs().max() > 0.05
    original = write_llava(tmp_path / "llava", model, pickled=False)
    hugging_face = convert(str(original), tmp_path / "hf", ConversionOptions(vision_tower=str(clip)))
    vicuna = write_language_model(tmp_path / "vicuna", model)
    for base in (original, hugging_face, vicuna):
        options = ConversionOptions(base=str(base), vision_tower=str(clip))
        out = convert(str(adapter), tmp_path / f"out-{base.name}", options)
        torch.testing.assert_close(converted_logits(out, pixels), expected, rtol=1e-5, atol=1e-5)


def test_projector_alone(model: OriginalLlava, clip: Path, pixels: torch.Tensor, tmp_path: Path) -> None:
    trained = copy.deepcopy(model)
    trained.projector = OriginalLlava(VOCABULARY, seed=7).projector
    folder = tmp_path / "run" / "mm_projector"
    folder.mkdir(parents=True)
    torch.save(
        {name: tensor.half() for name, tensor in trained.projector_tensors().items()}, folder / "checkpoint-5.bin"
    )
    trained.projector.half().float()
    (folder.parent / "config.json").write_text(json.dumps(model.config()))
    options = ConversionOptions(base=str(write_llava(tmp_path / "llava", model, pickled=False)), vision_tower=str(clip))
    hugging_face = convert(str(options.base), tmp_path / "hf", options)
    vicuna = write_language_model(tmp_path / "vicuna", model)
    for base in (options.base, str(vicuna), str(hugging_face)):
        out = convert(
            str(folder / "checkpoint-5.bin"),
            tmp_path / f"out-{Path(str(base)).name}",
            ConversionOptions(base=base, vision_tower=str(clip)),
        )
        torch.testing.assert_close(converted_logits(out, pixels), trained(IDS, pixels), rtol=1e-5, atol=1e-5)


OLD, NEW = "language_model.model.", "model.language_model."


@pytest.mark.parametrize(
    ("language", "projector", "prefix", "side"),
    [
        (OLD, "multi_modal_projector.", "base_model.model.", ".default.weight"),
        (NEW, "model.multi_modal_projector.", "module.base_model.model.", ".default.weight"),
    ],
)
def test_safe_eraser_checkpoint(
    language: str,
    projector: str,
    prefix: str,
    side: str,
    model: OriginalLlava,
    clip: Path,
    pixels: torch.Tensor,
    tmp_path: Path,
) -> None:
    """Names of transformers 4.46, which the published code requires, and of later releases."""
    trained = copy.deepcopy(model)
    trained.projector = OriginalLlava(VOCABULARY, seed=7).projector.half().float()
    layers = {name: layer.weight.data for name, layer in language_layers(model).items()}
    matrices, _ = random_lora(layers, rank=4, alpha=16)
    matrices = {name: tensor.half() for name, tensor in matrices.items()}
    for name, layer in language_layers(trained).items():
        layer.weight.data += 4 * (matrices[f"{name}.lora_B"].float() @ matrices[f"{name}.lora_A"].float())
    tensors = {
        f"{prefix}{language}{name.removeprefix('model.')}{side}": torch.nn.Parameter(tensor)
        for name, tensor in matrices.items()
    }
    names = {"0": "linear_1", "2": "linear_2"}
    for name, tensor in trained.projector.state_dict().items():
        number, _, kind = name.partition(".")
        # A result of `.to(torch.float16)` of a parameter, which is no leaf of the graph.
        tensors[f"{prefix}{projector}{names[number]}.{kind}"] = (torch.nn.Parameter(tensor) * 1).half()
    folder = tmp_path / "ckpt_results" / "step_20"
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "checkpoint.pt")
    (folder.parent / "cfg.yaml").write_text("LoRA:\n  r: 4\n  alpha: 16\nmodel_path: llava-hf/llava-1.5-7b-hf\n")
    original = write_llava(tmp_path / "llava", model, pickled=False)
    base = convert(str(original), tmp_path / "hf", ConversionOptions(vision_tower=str(clip)))
    out = convert(str(folder), tmp_path / "out", ConversionOptions(base=str(base)))
    torch.testing.assert_close(converted_logits(out, pixels), trained(IDS, pixels), rtol=1e-5, atol=1e-5)
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_half_precision_rounds_once(model: OriginalLlava, clip: Path, tmp_path: Path) -> None:
    base = write_llava(tmp_path / "base", model, dtype=torch.float16)
    half = copy.deepcopy(model)
    half.language_model.half().float()
    adapter = write_llava_lora(tmp_path / "adapter", copy.deepcopy(model), half)
    merged = copy.deepcopy(half)
    write_llava_lora(tmp_path / "unused", merged, half)
    out = convert(str(adapter), tmp_path / "out", ConversionOptions(base=str(base), vision_tower=str(clip)))
    tensors = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    name = "model.layers.1.mlp.down_proj"
    expected = language_layers(merged)[name].weight.data.half()
    assert torch.equal(tensors[f"language_model.{name}.weight"], expected)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"


def test_added_rows_are_the_mean(model: OriginalLlava, clip: Path, tmp_path: Path) -> None:
    source = write_llava(tmp_path / "source", model)
    out = convert(str(source), tmp_path / "out", ConversionOptions(vision_tower=str(clip)))
    tensors = load_file(out / "model.safetensors")
    for name, original in (("model.embed_tokens", "embed_tokens"), ("lm_head", "lm_head")):
        rows = tensors[f"language_model.{name}.weight"]
        weight = dict(model.language_model.named_parameters())[f"{name}.weight"].data
        assert torch.equal(rows[:VOCABULARY], weight), original
        torch.testing.assert_close(rows[VOCABULARY:], weight.mean(0).expand(len(rows) - VOCABULARY, -1))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("llava-hf", "USER: <image>\nDescribe it. ASSISTANT: the cat ASSISTANT:"),
        (
            "vicuna_v1",
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: <image>\nDescribe it. ASSISTANT: the "
            "cat</s>ASSISTANT:",
        ),
    ],
)
def test_processor(template: str, expected: str, model: OriginalLlava, clip: Path, tmp_path: Path) -> None:
    source = write_llava(tmp_path / "source", model)
    out = convert(str(source), tmp_path / "out", ConversionOptions(vision_tower=str(clip), template=template))
    processor = load_processor(out)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe it."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "the cat"}]},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == expected
    tokenizer = processor.tokenizer
    pieces = {text: index for index, (text, _) in enumerate(sentence_pieces())}
    # As LLaVA's code tokenizes it: the text after the image on its own, with a space at its beginning.
    assert tokenizer("USER: <image>\nDescribe it.")["input_ids"] == [
        1,
        *(pieces[text] for text in ("▁USER", ":", "▁")),
        VOCABULARY,
        *(pieces[text] for text in ("▁", "<0x0A>", "D", "e", "s", "c", "r", "i", "b", "e", "▁it", ".")),
    ]
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", VOCABULARY + 1)
    assert tokenizer.decode(tokenizer("the cat is red")["input_ids"], skip_special_tokens=True) == "the cat is red"


def test_tokenizer_without_sentencepiece_model(
    model: OriginalLlava, clip: Path, pixels: torch.Tensor, tmp_path: Path
) -> None:
    first = convert(
        str(write_llava(tmp_path / "first", model)), tmp_path / "out", ConversionOptions(vision_tower=str(clip))
    )
    source = write_llava(tmp_path / "source", model, shards=1)
    (source / "tokenizer.model").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(first / name, source / name)
    out = convert(str(source), tmp_path / "again", ConversionOptions(vision_tower=str(clip)))
    torch.testing.assert_close(converted_logits(out, pixels), model(IDS, pixels), rtol=1e-5, atol=1e-5)
    text = "USER: <image>\nDescribe it. ASSISTANT: the cat is red</s>"
    assert load_processor(out).tokenizer(text) == load_processor(first).tokenizer(text)


def test_marks_around_images(model: OriginalLlava, clip: Path, tmp_path: Path) -> None:
    marks = ["<im_patch>", "<im_start>", "<im_end>"]
    larger = OriginalLlava(VOCABULARY + len(marks))

    def with_marks(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        config["mm_use_im_start_end"] = True

    source = write_llava(tmp_path / "source", larger, with_tower=False, edit=with_marks)
    added = {text: VOCABULARY + number for number, text in enumerate(marks)}
    (source / "added_tokens.json").write_text(json.dumps(added))
    out = convert(str(source), tmp_path / "out", ConversionOptions(vision_tower=str(clip)))
    processor = load_processor(out)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "it"}]}]
    ids = processor.tokenizer(processor.apply_chat_template(messages))["input_ids"]
    assert ids[4:7] == [added["<im_start>"], VOCABULARY + 3, added["<im_end>"]]


def test_options_of_precision_and_tower(model: OriginalLlava, clip: Path, tmp_path: Path) -> None:
    options = ConversionOptions(vision_tower=str(clip), precision="bf16")
    base = convert(str(write_llava(tmp_path / "source", model)), tmp_path / "base", options)
    assert load_model(base, "bf16").dtype == torch.bfloat16
    torch.save({"base_model.model.multi_modal_projector.linear_1.bias": torch.ones(32)}, tmp_path / "checkpoint.pt")
    options = ConversionOptions(base=str(base), precision="fp32")
    out = convert(str(tmp_path / "checkpoint.pt"), tmp_path / "out", options)
    tensors = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert tensors["multi_modal_projector.linear_1.bias"].tolist() == [1.0] * 32
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("float32", "float32")
    assert AutoModelForImageTextToText.from_pretrained(out).dtype == torch.float32


def test_scaled_rope(model: OriginalLlava, clip: Path, tmp_path: Path) -> None:
    def scaled(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        config["rope_scaling"] = {"type": "linear", "factor": 2.0}

    source = write_llava(tmp_path / "source", model, pickled=False, edit=scaled)
    out = convert(str(source), tmp_path / "out", ConversionOptions(vision_tower=str(clip)))
    rope = load_model(out, "fp32").config.text_config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 2.0, 5000.0)
    text = json.loads((out / "config.json").read_text())["text_config"]
    assert text["rope_scaling"]["factor"] == 2.0  # for transformers 4
