"""Quantization rounds weights as the published formats do, and reports how many of them changed their bucket."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from attack_targets import tiny_target
from vlm_unlearn.errors import UserError
from vlm_unlearn.robustness import quantize
from vlm_unlearn.robustness.quantize import FORMATS, NF4_LEVELS, Format, Quantize, QuantizeOptions, buckets, dequantize


def rounded(weight: Tensor, number_format: Format, group_size: int = 128) -> Tensor:
    return dequantize(*buckets(weight, number_format, group_size), number_format, weight)


def test_int8_has_one_scale_for_each_output_channel() -> None:
    weight = torch.tensor([[127.0, -3.4, 0.6], [0.127, 0.0004, -0.0006]])
    expected = torch.tensor([[127.0, -3.0, 1.0], [0.127, 0.0, -0.001]])
    torch.testing.assert_close(rounded(weight, "int8"), expected)


def test_int4_has_one_scale_for_each_group() -> None:
    weight = torch.tensor([[7.0, -3.4, 0.7, 0.2, 0.1]])
    # Groups of two: scales 1, 0.1 and 0.1 / 7. The last group is padded.
    torch.testing.assert_close(rounded(weight, "int4", 2), torch.tensor([[7.0, -3.0, 0.7, 0.2, 0.1]]))
    # One group: only multiples of 1 remain.
    torch.testing.assert_close(rounded(weight, "int4"), torch.tensor([[7.0, -3.0, 1.0, 0.0, 0.0]]))
    assert buckets(weight, "int4")[0].tolist() == [[7, -3, 1, 0, 0]]


def test_nf4_rounds_to_the_nearest_published_level_of_its_block() -> None:
    levels = torch.tensor(NF4_LEVELS)
    torch.testing.assert_close(rounded(5 * levels[None], "nf4"), 5 * levels[None])
    weight = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))  # blocks of 64 span rows
    flat, values = weight.flatten(), rounded(weight, "nf4").flatten()
    for block, block_values in zip(flat.split(64), values.split(64), strict=True):
        distances = (block[:, None] - block.abs().max() * levels).abs()
        torch.testing.assert_close((block - block_values).abs(), distances.min(1).values)


@pytest.mark.parametrize("number_format", FORMATS)
def test_rounding_keeps_zeros_and_changes_rounded_weights_no_more(number_format: Format) -> None:
    assert not rounded(torch.zeros(2, 70), number_format).any()
    weight = rounded(torch.randn(4, 70, generator=torch.Generator().manual_seed(0)), number_format)
    torch.testing.assert_close(rounded(weight, number_format), weight)


def test_nf4_of_bitsandbytes_has_the_same_values() -> None:
    pytest.importorskip("bitsandbytes")
    weight = torch.randn(33, 70, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantize.round_with_bitsandbytes(weight), rounded(weight, "nf4"))


def test_bitsandbytes_is_required_only_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        quantize.round_with_bitsandbytes(torch.ones(2, 64))
    assert error.value.code == "missing-package"


def test_each_format_rounds_the_original_weights(tiny_model: Path, training_sets: dict[str, Path], world: Path) -> None:
    target = tiny_target(tiny_model, training_sets["safe_eraser"], world, noise=0.01)
    layers = target.vlm.decoder_linears()
    assert len(layers) == 14  # seven in each of two decoder layers
    originals = {name: parameter.clone() for name, parameter in target.vlm.model.named_parameters()}
    base = target.load_base().decoder_linears()
    attack = Quantize(QuantizeOptions(group_size=32))
    states = []
    for state, number_format in zip(attack.run(target), FORMATS, strict=True):
        states.append(state.name)
        changed = count = 0
        for name, parameter in target.vlm.model.named_parameters():
            layer = name.removesuffix(".weight")
            original = originals[name]
            assert torch.equal(parameter, rounded(original, number_format, 32) if layer in layers else original)
            if layer in layers:
                codes = [buckets(weight, number_format, 32)[0] for weight in (original, base[layer].weight)]
                changed, count = changed + int((codes[0] != codes[1]).sum()), count + original.numel()
        assert state.facts == {"changed_buckets": changed / count}
        assert 0 < state.facts["changed_buckets"] < 1
    assert states == ["quantize/int8", "quantize/int4", "quantize/nf4"]


def test_no_bucket_of_the_base_model_itself_changes(
    tiny_model: Path, training_sets: dict[str, Path], world: Path
) -> None:
    target = tiny_target(tiny_model, training_sets["safe_eraser"], world)
    states = list(Quantize(QuantizeOptions(formats=["nf4"])).run(target))
    assert [state.facts for state in states] == [{"changed_buckets": 0.0}]
