"""The math of each defense on small problems whose results are derived by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from helpers import raises_code
from vlm_unlearn.config import DefenseConfig
from vlm_unlearn.methods import METHODS
from vlm_unlearn.methods.wrappers import DEFENSES, Defense, Weights, build_defenses
from vlm_unlearn.methods.wrappers.base import norm

SEED, STEP = 3, 7


class Quadratic:
    """The loss ``w' A w / 2`` with the gradient ``A w`` and the Hessian ``A``. The weights are in two parameters."""

    step, seed = STEP, SEED

    def __init__(self) -> None:
        self.matrix = torch.tensor([[3.0, 1.0, 0.5], [1.0, 2.0, 0.0], [0.5, 0.0, 1.0]])
        self.weights = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.5])}
        self.points: list[Tensor] = []  # at which the gradient was computed

    def parameters(self) -> Mapping[str, Tensor]:
        return self.weights

    def gradient(self, shift: Weights | None = None) -> Weights:
        point = joined(self.weights)
        if shift is not None:
            point = point + joined(shift)
            for value in shift.values():
                value.fill_(math.nan)  # the interface allows overwriting them
        self.points.append(point)
        gradient = self.matrix @ point
        return {"a": gradient[:2].clone(), "b": gradient[2:].clone()}


def joined(weights: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([weights["a"], weights["b"]])


def build(name: str, **options: object) -> Defense:
    return build_defenses([DefenseConfig.model_validate({"name": name, **options})])[0]


def test_sam_takes_the_gradient_at_the_worst_weights_nearby() -> None:
    """For the quadratic, it is ``A (w + rho * A w / |A w|)``."""
    problem = Quadratic()
    weights = joined(problem.weights)
    ascent = problem.matrix @ weights
    expected = problem.matrix @ (weights + 0.1 * ascent / ascent.norm())
    result = build("sam", rho=0.1).forget_gradient(problem)
    torch.testing.assert_close(joined(result), expected)
    assert joined(problem.weights).equal(weights)
    assert len(problem.points) == 2


def test_sam_at_a_minimum_has_no_perturbation() -> None:
    problem = Quadratic()
    for value in problem.weights.values():
        value.zero_()
    assert joined(build("sam").forget_gradient(problem)).equal(torch.zeros(3))


@pytest.mark.parametrize("radius", [0.01, 0.5])
def test_gp_adds_the_gradient_of_the_norm(radius: float) -> None:
    """The gradient of ``|A w|`` is ``A A w / |A w|``, which a finite difference gives exactly for a quadratic."""
    problem = Quadratic()
    weights = joined(problem.weights).requires_grad_()
    loss = weights @ problem.matrix @ weights / 2 + 0.3 * (problem.matrix @ weights).norm()
    (expected,) = torch.autograd.grad(loss, weights)
    result = build("gp", weight=0.3, radius=radius).forget_gradient(problem)
    torch.testing.assert_close(joined(result), expected, atol=1e-4, rtol=1e-4)


def test_gp_with_equal_weight_and_radius_is_sam() -> None:
    gp = build("gp", weight=0.1, radius=0.1).forget_gradient(Quadratic())
    torch.testing.assert_close(joined(gp), joined(build("sam", rho=0.1).forget_gradient(Quadratic())))


def test_rs_averages_the_gradients_at_noisy_weights() -> None:
    problem = Quadratic()
    weights = joined(problem.weights)
    result = joined(build("rs", sigma=0.5, samples=4).forget_gradient(problem))
    points = torch.stack(problem.points)
    torch.testing.assert_close(result, problem.matrix @ points.mean(dim=0))
    noise = (points - weights) / 0.5
    assert len(set(noise.flatten().tolist())) == 12  # no two draws are equal
    many = Quadratic()
    mean = joined(build("rs", sigma=0.5, samples=900).forget_gradient(many))
    draws = (torch.stack(many.points) - weights) / 0.5
    assert draws.std().item() == pytest.approx(1.0, abs=0.05)
    assert (mean - many.matrix @ weights).norm() < 0.2  # the loss is quadratic: the noise averages out


def test_noise_of_rs_is_a_function_of_seed_and_step() -> None:
    def points(seed: int, step: int) -> Tensor:
        problem = Quadratic()
        problem.seed, problem.step = seed, step
        torch.rand(5)  # the state of torch's generator has no effect
        build("rs", sigma=0.5).forget_gradient(problem)
        return torch.stack(problem.points)

    assert points(SEED, STEP).equal(points(SEED, STEP))
    assert not points(SEED, STEP).equal(points(SEED, STEP + 1))
    assert not points(SEED, STEP).equal(points(SEED + 1, STEP))


def averaged(defense: Defense, snapshots: Sequence[Tensor], start: int = 1) -> Defense:
    for step, snapshot in enumerate(snapshots[start - 1 :], start=start):
        defense.after_step({"w": snapshot}, step)
    return defense


def swa(steps: int, **options: object) -> Defense:
    defense = build("swa", **options)
    defense.prepare(METHODS["npo"](METHODS["npo"].options_type()), 2, steps)
    return defense


def test_swa_is_the_arithmetic_mean_of_its_snapshots() -> None:
    """Steps 4, 6, 8 and 10 of 10, of weights that training then changes in place."""
    snapshots = list(torch.randn(10, 5))
    defense = averaged(swa(10, start_step=4, interval=2), [value.clone() for value in snapshots])
    weights = defense.final_weights()
    assert weights is not None
    torch.testing.assert_close(weights["w"], torch.stack([snapshots[step - 1] for step in (4, 6, 8, 10)]).mean(dim=0))


def test_swa_averages_bf16_weights_in_float32() -> None:
    snapshots = [torch.full((1,), 1.0 + 2**-7 * (step % 2), dtype=torch.bfloat16) for step in range(100)]
    weights = averaged(swa(100, start_step=1, interval=1), snapshots).final_weights()
    assert weights is not None
    assert weights["w"].item() == pytest.approx(1.0 + 2**-8, abs=1e-6)  # between two bf16 values


def test_swa_starts_at_80_percent_and_has_no_mean_before() -> None:
    defense = swa(125)
    averaged(defense, list(torch.ones(99, 1)))
    assert defense.final_weights() is None
    defense.after_step({"w": torch.ones(1)}, 100)
    assert defense.final_weights() is not None


def test_swa_resumes_to_the_bit() -> None:
    snapshots = list(torch.randn(20, 50))
    options = {"start_step": 3, "interval": 2}
    uninterrupted = averaged(swa(20, **options), snapshots).final_weights()
    for stop in (2, 3, 8, 20):
        resumed = swa(20, **options)
        resumed.load_state(averaged(swa(20, **options), snapshots[:stop]).state())
        weights = averaged(resumed, snapshots, start=stop + 1).final_weights()
        assert uninterrupted is not None
        assert weights is not None
        assert weights["w"].equal(uninterrupted["w"])


class LatentQuadratic:
    """The loss ``sum((h + shift - target)^2) / 2`` over layers, at positions of which the last is an answer."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.states = {layer: torch.randn(2, 3, 4, generator=generator) for layer in (0, 1)}
        self.calls = 0

    def mask(self) -> Tensor:
        return torch.tensor([[True, True, False], [True, True, False]])

    def zeros(self, layers: Sequence[int]) -> dict[int, Tensor]:
        return {layer: torch.zeros(2, 3, 4) for layer in layers}

    def loss(self, shifts: Mapping[int, Tensor]) -> float:
        return sum(((self.states[layer] + shift) ** 2).sum().item() / 2 for layer, shift in shifts.items())

    def gradient(self, shifts: Mapping[int, Tensor]) -> dict[int, Tensor]:
        self.calls += 1
        return {layer: self.states[layer] + shift for layer, shift in shifts.items()}


def test_lat_raises_the_inner_loss_within_its_bound() -> None:
    """The worst shift of length epsilon is along the states themselves, so that |h + shift| = |h| + epsilon."""
    problem = LatentQuadratic()
    before = {layer: value.clone() for layer, value in problem.states.items()}
    shifts = build("lat", layers=[0, 1], epsilon=0.5, steps=6).latent_shifts(problem)
    assert shifts is not None
    assert problem.calls == 6
    assert problem.loss(shifts) > problem.loss(problem.zeros([0, 1]))
    for layer, shift in shifts.items():
        expected = 0.5 * problem.states[layer] / problem.states[layer].norm(dim=-1, keepdim=True)
        expected[:, 2] = 0  # answers are not attacked
        torch.testing.assert_close(shift, expected)
        assert problem.states[layer].equal(before[layer])


def test_lat_losses_grow_with_the_steps_until_the_bound() -> None:
    losses = []
    for steps in (1, 2, 4, 8):
        problem = LatentQuadratic()
        shifts = build("lat", layers=[0], epsilon=5.0, steps=steps, step_size=0.5).latent_shifts(problem)
        assert shifts is not None
        losses.append(problem.loss(shifts))
    assert losses == sorted(losses)
    assert len(set(losses)) == 4


def test_norm_is_that_of_all_tensors_together() -> None:
    assert norm({"a": torch.tensor([3.0]), "b": torch.tensor([[0.0, 4.0]])}).item() == pytest.approx(5.0)


@pytest.mark.parametrize("name", sorted(DEFENSES.built_in))
def test_every_defense_has_a_source_and_documented_options(name: str) -> None:
    defense = DEFENSES[name]
    assert defense.name == name
    assert "arXiv" in defense.source
    assert all(field.description for field in defense.options_type.model_fields.values())
    build(name)  # every option has a default


def test_invalid_defenses_are_rejected() -> None:
    with raises_code("unknown-name", field="defense"):
        build("same")
    with raises_code("unknown-key", field="rhoo"):
        build("sam", rhoo=0.1)
    with raises_code("conflicting-settings", field="defense"):
        build_defenses([DefenseConfig(name="sam"), DefenseConfig(name="rs")])
    with raises_code("out-of-range", field="defense.start_step"):
        swa(10, start_step=11)
    npo, rmu = (METHODS[name](METHODS[name].options_type()) for name in ("npo", "rmu"))
    with raises_code("out-of-range", field="defense.layers"):
        build("lat", layers=[0, 4]).prepare(npo, 4, 10)
    with raises_code("conflicting-settings", field="defense.layers"):
        build("lat", layers=[8]).prepare(rmu, 32, 10)  # steers layer 7
    assert len(build_defenses([DefenseConfig(name=name) for name in ("lat", "sam", "swa")])) == 3
