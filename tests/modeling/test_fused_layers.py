"""The faster forms of decoder operations have the outputs and gradients of transformers' own."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import families
from vlm_unlearn.modeling.fused_layers import fused_layers
from vlm_unlearn.modeling.loader import load_model
from vlm_unlearn.modeling.vlm import VisionLanguageModel


@pytest.fixture(scope="module", params=sorted({*families.FAMILIES} - {"instructblip"}))  # needs an image
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    folder = families.shared_folder(request.param, tmp_path_factory)
    model = load_model(folder, "fp32")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.25)
            if "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    return VisionLanguageModel(model)


def results(vlm: VisionLanguageModel, fused: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the logits of a text, and the gradients of all parameters and of the embeddings."""
    vlm.model.zero_grad()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [9, 8, 7, 6, 5, 4, 3]])
    embeddings = vlm.base_model.get_input_embeddings()(ids).detach().requires_grad_()
    with fused_layers(vlm.decoder_layers) if fused else nullcontext():
        logits = vlm.model(inputs_embeds=embeddings, use_cache=False).logits
        logits.log_softmax(dim=-1)[..., 3].sum().backward()
    gradients = {name: value.grad.clone() for name, value in vlm.model.named_parameters() if value.grad is not None}
    assert embeddings.grad is not None
    return logits.detach(), {**gradients, "embeddings": embeddings.grad}


def test_fused_layers_have_the_outputs_and_gradients_of_the_family(vlm: VisionLanguageModel) -> None:
    logits, gradients = results(vlm, fused=False)
    fused_logits, fused_gradients = results(vlm, fused=True)
    torch.testing.assert_close(fused_logits, logits, atol=1e-5, rtol=1e-5)
    assert fused_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            fused_gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_layers_of_llama_are_fused_and_restored(tiny_model: Path) -> None:
    vlm = VisionLanguageModel(load_model(tiny_model, "fp32"))
    source = sys.modules[type(vlm.decoder_layers[0]).__module__]
    rotary = source.apply_rotary_pos_emb
    modules: list[nn.Module] = []
    for layer in vlm.decoder_layers:
        modules += [layer.input_layernorm, layer.post_attention_layernorm, layer.mlp]
    with fused_layers(vlm.decoder_layers):
        assert all("forward" in vars(module) for module in modules)
        assert source.apply_rotary_pos_emb is not rotary
        with fused_layers(vlm.decoder_layers):  # a second training in the first changes nothing
            pass
        assert all("forward" in vars(module) for module in modules)
    assert not any("forward" in vars(module) for module in modules)
    assert source.apply_rotary_pos_emb is rotary


class ShiftedRMSNorm(nn.Module):
    """Multiplies by 1 + weight, as Gemma does."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), 1e-6

    def forward(self, states: Tensor) -> Tensor:
        return (1 + self.weight) * states * (states.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class RMSNormWithOtherInputs(ShiftedRMSNorm):
    def forward(self, states: Tensor, gate: Tensor) -> Tensor:
        return super().forward(states) * gate


@pytest.mark.parametrize("kind", [ShiftedRMSNorm, RMSNormWithOtherInputs])
def test_norm_with_another_result_keeps_its_own(kind: type[ShiftedRMSNorm]) -> None:
    layers = nn.ModuleList([kind(torch.ones(8))])
    with fused_layers(layers):
        assert "forward" not in vars(layers[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_not_fused(tiny_model: Path, dtype: torch.dtype) -> None:
    layers: Any = VisionLanguageModel(load_model(tiny_model, "fp32")).decoder_layers
    with fused_layers(layers.to(dtype)):
        assert not any("forward" in vars(module) for module in layers.modules())


def test_autocast_has_the_results_of_the_family(tiny_model: Path) -> None:
    """Weights are in float32 here, but most states are not."""
    vlm = VisionLanguageModel(load_model(tiny_model, "fp32"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, gradients = results(vlm, fused=False)
        fused_logits, fused_gradients = results(vlm, fused=True)
    torch.testing.assert_close(fused_logits, logits, atol=0.02, rtol=0.02)
    assert fused_gradients.keys() == gradients.keys()


def test_last_layer_runs_only_the_positions_whose_logits_are_used(tiny_model: Path) -> None:
    vlm = VisionLanguageModel(load_model(tiny_model, "fp32"))
    ids = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    positions = torch.tensor([1, 4, 4, 7])  # rows that share a prefix use a position twice
    widths: list[int] = []
    vlm.decoder_layers[-1].mlp.down_proj.register_forward_hook(
        lambda _module, inputs, _output: widths.append(inputs[0].numel() // inputs[0].shape[-1])
    )
    vlm.model.train()
    outputs = []
    for all_positions in (False, True):
        vlm.model.zero_grad()
        chosen = torch.arange(10) if all_positions else positions
        logits, _ = vlm.run({"input_ids": ids}, chosen)
        logits = logits[positions] if all_positions else logits
        logits.log_softmax(dim=-1)[:, 3].sum().backward()
        gradients = {name: value.grad for name, value in vlm.model.named_parameters() if value.grad is not None}
        outputs.append((logits, gradients))
    assert widths == [3, 10]
    torch.testing.assert_close(outputs[0][0], outputs[1][0])
    assert outputs[0][1].keys() == outputs[1][1].keys()
    for name, gradient in outputs[1][1].items():
        torch.testing.assert_close(outputs[0][1][name], gradient, atol=1e-6, rtol=1e-4)
