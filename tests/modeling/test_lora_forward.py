"""The faster LoRA layers have PEFT's outputs and gradients, and dropout with the distribution of PyTorch's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Conv2d, Embedding, Linear
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helpers import recipe
from vlm_unlearn.modeling import lora_forward
from vlm_unlearn.modeling.lora_forward import MAX_SPARSE_RATE, dropped_positions, fast_lora
from vlm_unlearn.training import method_trainer
from vlm_unlearn.training.runner import run_recipe


def lora_layer(bias: bool = False, **settings: Any) -> tuple[PeftModel, Any]:
    """Returns a model of one linear layer 12 -> 20 with trained adapters, and its LoRA layer."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False, **settings)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 20, bias=bias)), config).train()
    return model, model.base_model.model[0]


def results(model: nn.Module, x: Tensor, fast: bool, train_base: bool = False) -> dict[str, Tensor]:
    """Returns the output of a model after `torch.manual_seed(1)`, and all gradients of a function of it."""
    x = x.detach().clone().requires_grad_()
    for name, parameter in model.named_parameters():
        parameter.grad = None
        if "base_layer" in name:
            parameter.requires_grad = train_base
    torch.manual_seed(1)
    with fast_lora(model) if fast else nullcontext():
        output = model(x)
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert x.grad is not None
    return {"output": output.detach(), "x": x.grad, **gradients}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def fast_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that gets an item for each layer that the faster pass computes."""
    calls: list[int] = []
    apply = lora_forward._LoraFunction.apply

    def record(*args: Any) -> Any:
        calls.append(1)
        return apply(*args)

    monkeypatch.setattr(lora_forward._LoraFunction, "apply", record)
    return calls


# Equal results


INPUTS: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: torch.randn(5, 12),
    "batch": lambda: torch.randn(3, 5, 12),
    "one": lambda: torch.randn(12),
    "empty": lambda: torch.randn(0, 5, 12),
    "transposed": lambda: torch.randn(5, 3, 12).transpose(0, 1),
    "expanded": lambda: torch.randn(1, 5, 12).expand(3, 5, 12),
}


@pytest.mark.parametrize("train_base", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs", INPUTS)
def test_results_equal_pefts(inputs: str, bias: bool, train_base: bool, fast_calls: list[int]) -> None:
    model, _ = lora_layer(bias)
    x = INPUTS[inputs]()
    expected = results(model, x, fast=False, train_base=train_base)
    assert_close(results(model, x, fast=True, train_base=train_base), expected)
    assert fast_calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_results_equal_pefts_in_other_precisions(dtype: torch.dtype, fast_calls: list[int]) -> None:
    model, _ = lora_layer(bias=True)
    model.to(dtype)
    x = torch.randn(3, 5, 12, dtype=dtype)
    expected = results(model, x, fast=False)
    actual = results(model, x, fast=True)
    tolerance = 8 * torch.finfo(dtype).eps
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance * float(value.abs().max()))
    assert fast_calls


def test_rank_stabilized_lora_and_the_active_one_of_two_adapters(fast_calls: list[int]) -> None:
    model, _ = lora_layer(use_rslora=True)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, lora_dropout=0.9))
    x = torch.randn(3, 5, 12)
    assert_close(results(model, x, fast=True), results(model, x, fast=False))
    assert len(fast_calls) == 1


@pytest.mark.parametrize("train_base", [False, True])
@pytest.mark.parametrize("rate", [0.05, MAX_SPARSE_RATE])
def test_results_with_dropout_equal_those_of_the_same_mask(rate: float, train_base: bool) -> None:
    model, layer = lora_layer(bias=True, lora_dropout=rate)
    x = torch.randn(7, 9, 12)
    actual = results(model, x, fast=True, train_base=train_base)
    torch.manual_seed(1)
    mask = torch.ones(x.numel()).index_fill(0, dropped_positions(x.numel(), rate), 0.0).view(x.shape)
    assert 0 < int((mask == 0).sum()) < mask.numel()

    class Mask(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return values * mask / (1 - rate)

    layer.lora_dropout["default"] = Mask()
    assert_close(actual, results(model, x, fast=False, train_base=train_base))


def test_gradients_of_frozen_adapters_and_inputs_are_not_computed() -> None:
    model, layer = lora_layer()
    layer.lora_A["default"].weight.requires_grad = False
    with fast_lora(model):
        model(torch.randn(3, 12)).sum().backward()
    assert layer.lora_A["default"].weight.grad is None
    assert layer.lora_B["default"].weight.grad is not None
    assert layer.base_layer.weight.grad is None


def test_first_and_second_derivatives() -> None:
    model, layer = lora_layer(bias=True)
    model.double().requires_grad_()
    weights = [layer.base_layer.weight, layer.base_layer.bias, layer.lora_A["default"].weight]
    tensors = (torch.randn(3, 12, dtype=torch.double, requires_grad=True), *weights, layer.lora_B["default"].weight)
    positions = torch.tensor([1, 5, 17])

    def function(*values: Tensor) -> Any:
        return lora_forward._LoraFunction.apply(*values, positions, 1.5)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_repeats_the_mask(use_reentrant: bool, fast_calls: list[int]) -> None:
    model, _ = lora_layer(lora_dropout=0.2)
    x = torch.randn(3, 5, 12)
    expected = results(model, x, fast=True)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, values: Tensor) -> Tensor:
            output: Tensor = checkpoint(self.inner, values, use_reentrant=use_reentrant)
            return output

    actual = results(Checkpointed(), x, fast=True)
    assert len(fast_calls) == 3
    for name, value in expected.items():
        assert actual[name if name in ("output", "x") else f"inner.{name}"].equal(value)


def test_output_can_be_changed_in_place() -> None:
    model, layer = lora_layer()
    with fast_lora(model):
        model(torch.randn(3, 5, 12)).mul_(2).sum().backward()
    assert layer.lora_B["default"].weight.grad is not None


@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_saves_no_more_for_the_backward_pass_than_peft(rate: float) -> None:
    model, _ = lora_layer(lora_dropout=rate)

    def saved_bytes(fast: bool) -> int:
        storages: dict[int, int] = {}
        tensors = []

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            tensors.append(tensor)  # so that no address is used again
            return tensor

        x = torch.randn(50, 40, 12, requires_grad=True)
        with fast_lora(model) if fast else nullcontext():
            torch.manual_seed(0)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                model(x)
        return sum(storages.values())

    assert saved_bytes(fast=True) <= saved_bytes(fast=False)


# PEFT's forward pass in all other cases


def hooked(model: PeftModel, layer: Any) -> None:
    layer.base_layer.register_forward_hook(lambda _module, _inputs, output: output * 2)


def backward_hooked(model: PeftModel, layer: Any) -> None:
    layer.lora_A["default"].register_full_backward_hook(lambda _module, inputs, _outputs: (inputs[0] * 2,))


def subclassed(model: PeftModel, layer: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, values: Tensor) -> Tensor:
            return F.linear(values, self.weight * 2)

    layer.base_layer.__class__ = Doubled


def patched(model: PeftModel, layer: Any) -> None:
    layer.base_layer.forward = lambda values: F.linear(values, layer.base_layer.weight * 2)


def half_precision_base(model: PeftModel, layer: Any) -> None:
    layer.base_layer.bfloat16()


def merged(model: PeftModel, layer: Any) -> None:
    layer.merge()


def second_adapter(model: PeftModel, layer: Any) -> None:
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])


def patched_dropout(model: PeftModel, layer: Any) -> None:
    layer.lora_dropout["default"] = nn.Identity()
    layer.lora_dropout["default"].forward = lambda values: values * 3


def unchanged(model: PeftModel, layer: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({"use_dora": True}, unchanged),
        ({"lora_bias": True}, unchanged),
        ({"lora_dropout": 0.5}, unchanged),
        ({"lora_dropout": 0.999}, unchanged),
        *(
            ({}, change)
            for change in (hooked, backward_hooked, subclassed, patched, merged, second_adapter, patched_dropout)
        ),
    ],
)
def test_other_layers_run_pefts_forward_pass(
    settings: dict[str, Any], change: Callable[[PeftModel, Any], None], fast_calls: list[int]
) -> None:
    model, layer = lora_layer(bias="lora_bias" in settings, **settings)
    change(model, layer)
    x = torch.randn(3, 5, 12)
    expected = results(model, x, fast=False)
    actual = results(model, x, fast=True)
    assert all(actual[name].equal(value) for name, value in expected.items())
    assert not fast_calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_pefts_forward_pass(dtype: torch.dtype, fast_calls: list[int]) -> None:
    model, _ = lora_layer(lora_dropout=0.1)
    x = torch.randn(3, 5, 12)
    with torch.autocast("cpu", dtype=dtype):
        expected = results(model, x, fast=False)
        actual = results(model, x, fast=True)
    assert all(actual[name].equal(value) for name, value in expected.items())
    assert not fast_calls


def test_base_layer_in_half_precision_with_float32_adapters_runs_pefts_forward_pass(fast_calls: list[int]) -> None:
    model, _ = lora_layer()
    half_precision_base(model, model.base_model.model[0])
    x = torch.randn(3, 5, 12, dtype=torch.bfloat16)
    expected = results(model, x, fast=False)
    actual = results(model, x, fast=True)
    assert all(actual[name].equal(value) for name, value in expected.items())
    assert not fast_calls


def test_disabled_adapters_and_adapter_names_run_pefts_forward_pass(fast_calls: list[int]) -> None:
    model, layer = lora_layer()
    x = torch.randn(2, 12)
    with fast_lora(model):
        with model.disable_adapter():
            assert model(x).equal(F.linear(x, layer.base_layer.weight))
        mixed = model.eval()(x, adapter_names=["__base__", "default"])
        assert not fast_calls
        torch.testing.assert_close(mixed[1], model(x)[1])
        assert mixed[0].equal(model(x, adapter_names=["__base__", "default"])[0])
    assert len(fast_calls) == 1


def test_other_kinds_of_layers_are_unchanged_and_classes_are_restored() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Conv2d(1, 2, 1))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1", "2"]))
    layers = list(model.base_model.model)
    types: list[type] = []

    def fail(*_: object) -> None:
        types.extend(type(layer) for layer in layers)
        raise RuntimeError("inside")

    layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside"), fast_lora(model):
        layers[1](torch.randn(1, 4))
    assert types[::2] == [Embedding, Conv2d]
    assert types[1] is not Linear
    assert issubclass(types[1], Linear)
    assert [type(layer) for layer in layers] == [Embedding, Linear, Conv2d]


def test_copy_of_a_model_uses_its_weights() -> None:
    model, layer = lora_layer()
    x = torch.randn(2, 12)
    with fast_lora(model):
        twin = copy.deepcopy(model)
        expected = model(x)
        layer.lora_B["default"].weight.data.zero_()
        assert twin(x).equal(expected)
        assert not model(x).equal(expected)


def test_model_without_adapters_is_unchanged() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with fast_lora(model):
        assert type(model[0]) is nn.Linear


# The distribution of dropout


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.25, 0.9])
def test_positions_are_independent_and_have_the_rate(rate: float) -> None:
    """Compares counts with their standard deviations: of all positions, each column, neighbors and distances."""
    torch.manual_seed(0)
    draws, size = 400, 500
    dropped = torch.zeros(draws, size)
    for row in dropped:
        positions = dropped_positions(size, rate)
        assert (positions[1:] > positions[:-1]).all()
        row[positions] = 1

    def deviation(values: Tensor, probability: float) -> Tensor:
        return (values.sum(0) - len(values) * probability) / math.sqrt(len(values) * probability * (1 - probability))

    assert abs(float(deviation(dropped.flatten(), rate))) < 4
    columns = deviation(dropped, rate)
    assert columns.abs().max() < 5.5
    assert float(columns.var()) == pytest.approx(1, abs=0.3)  # as independent draws have it
    for distance in (1, 2, 7):
        pairs = (dropped[:, :-distance] * dropped[:, distance:]).flatten()
        assert abs(float(pairs.mean()) - rate**2) < 6 * math.sqrt(rate**2 / len(pairs))
    rows = dropped.sum(1)
    assert float(rows.var()) == pytest.approx(size * rate * (1 - rate), rel=0.35)
    following = (dropped[:-1] * dropped[1:]).flatten()  # of two draws
    assert abs(float(following.mean()) - rate**2) < 6 * math.sqrt(rate**2 / len(following))


@pytest.mark.parametrize("rate", [1e-30, 1e-9, 0.5, 1 - 1e-12])
@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_extreme_rates_and_sizes(size: int, rate: float) -> None:
    torch.manual_seed(0)
    positions = dropped_positions(size, rate)
    assert positions.dtype == torch.long
    assert positions.tolist() == sorted({*positions.tolist()} & {*range(size)})
    if rate < 1e-8:
        assert not len(positions)
    if rate > 0.9:
        assert len(positions) == size


def test_positions_follow_the_default_generator() -> None:
    state = torch.get_rng_state()
    first = dropped_positions(10_000, 0.1)
    second = dropped_positions(10_000, 0.1)
    torch.set_rng_state(state)
    assert dropped_positions(10_000, 0.1).equal(first)
    assert not first.equal(second)


def test_more_draws_follow_where_the_first_are_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_forward.math, "sqrt", lambda value: -(value**0.5))
    torch.manual_seed(0)
    counts = [len(dropped_positions(3000, 0.2)) for _ in range(50)]
    assert sum(counts) / 50 == pytest.approx(600, abs=15)


def test_expectation_over_masks_is_the_output_without_dropout() -> None:
    model, _ = lora_layer(lora_dropout=0.2)
    x = torch.randn(12)
    torch.manual_seed(0)
    with fast_lora(model), torch.no_grad():
        mean = model(x.expand(40_000, 12)).mean(0)
        model.eval()
        torch.testing.assert_close(mean, model(x), atol=0.03, rtol=0)


# In training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_without_dropout_trains_the_same_weights_as_with_pefts_forward_pass(
    tiny_model: Path,
    training_sets: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpointing: bool,
    fast_calls: list[int],
) -> None:
    def train(name: str) -> dict[str, Tensor]:
        training = {"gradient_checkpointing": checkpointing, "max_steps": 3}
        trainable = {"mode": "lora", "lora": {"r": 4}}
        result = run_recipe(
            recipe(tiny_model, training_sets["harmful"], tmp_path / name, "npo", trainable=trainable, training=training)
        )
        return load_file(result / "adapter_model.safetensors")

    fast = train("fast")
    assert fast_calls
    calls = len(fast_calls)
    monkeypatch.setattr(method_trainer, "fast_lora", lambda _model: nullcontext())
    expected = train("peft")
    assert len(fast_calls) == calls
    assert fast.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(fast[name], value, atol=1e-5, rtol=1e-3)
