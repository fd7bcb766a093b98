"""Every loss against the values of the published expressions and against numbers derived by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from vlm_unlearn.losses import (
    answer_mask,
    answer_nll,
    bounded_ascent_loss,
    dpo_loss,
    kl_loss,
    npo_loss,
    npo_retain_loss,
    rerouting_forget_loss,
    rerouting_retain_loss,
    rmu_forget_loss,
    rmu_retain_loss,
    simnpo_loss,
    undial_loss,
)

CASES = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())
PD_WEIGHTS = {"ga_pd": 0.5, "gd_pd": 0.5, "kl_pd": 1.0, "po_pd": 1.0}


def tensors(branch: dict[str, object]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(value) for key, value in branch.items()}


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_losses_match_the_golden_values(case: dict[str, object]) -> None:
    expect, beta = case["expect"], case["beta"]
    forget, retain, decouple = (tensors(case[role]) for role in ("forget", "retain", "decouple"))

    def nll(branch: dict[str, torch.Tensor], key: str = "logits") -> tuple[torch.Tensor, torch.Tensor]:
        return answer_nll(branch[key], branch["labels"])

    def batch(*pairs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return sum(nll.sum() for nll, _ in pairs) / sum(tokens.sum() for _, tokens in pairs)

    l_f, l_r, l_pd = batch(nll(forget)), batch(nll(retain)), batch(nll(decouple))
    reference_f, reference_r = batch(nll(forget, "reference_logits")), batch(nll(retain, "reference_logits"))
    (f_sum, f_tokens), (g_sum, g_tokens) = nll(forget), nll(forget, "reference_logits")
    control = torch.tensor(case["control_direction"])
    control = control / control.norm() * case["steering_coefficient"]
    alpha = case["rmu_retain_alpha"]
    kl_all = kl_loss(retain["logits"], retain["reference_logits"])
    po = batch(nll(forget), nll(retain))
    losses = {
        "sample_token_mean_nll_forget": f_sum / f_tokens,
        "sample_token_mean_nll_forget_reference": g_sum / g_tokens,
        "batch_token_mean_nll_forget": l_f,
        "batch_token_mean_nll_retain": l_r,
        "batch_token_mean_nll_decouple": l_pd,
        "npo_forget_batch_mean": npo_loss(l_f[None], reference_f[None], beta),
        "npo_retain_batch_mean": npo_retain_loss(l_r[None], reference_r[None], beta),
        "npo_forget_per_sample_mean": npo_loss(f_sum / f_tokens, g_sum / g_tokens, beta),
        "kl_all_positions": kl_all,
        "kl_answer_tokens": kl_loss(retain["logits"], retain["reference_logits"], answer_mask(retain["labels"])),
        "po": po,
        "rmu_forget_all_positions": rmu_forget_loss(forget["hidden"], control),
        "rmu_retain_all_positions": alpha * rmu_retain_loss(retain["hidden"], retain["reference_hidden"]),
        "rmu_forget_masked": rmu_forget_loss(forget["hidden"], control, forget["attention_mask"]),
        "rmu_retain_masked": alpha
        * rmu_retain_loss(retain["hidden"], retain["reference_hidden"], retain["attention_mask"]),
        "ga": -l_f,
        "ga_pd": -l_f + PD_WEIGHTS["ga_pd"] * l_pd,
        "gd": -l_f + l_r,
        "gd_pd": -l_f + 0.5 * l_r + PD_WEIGHTS["gd_pd"] * l_pd,
        "kl_total": -l_f + kl_all,
        "kl_pd": -l_f + kl_all + PD_WEIGHTS["kl_pd"] * l_pd,
        "po_pd": po + PD_WEIGHTS["po_pd"] * l_pd,
    }
    assert set(losses) == set(expect)
    for name, value in expect.items():
        torch.testing.assert_close(
            losses[name].float(), torch.tensor(value), atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_npo_at_and_far_above_the_reference_has_the_values_by_hand() -> None:
    """At the reference the loss is -2/beta * log(1/2) = 2 ln 2 / beta. Far above it, the loss is 0."""
    at_reference = npo_loss(torch.tensor([1.5]), torch.tensor([1.5]), beta=0.5)
    assert at_reference.item() == pytest.approx(4 * math.log(2))
    assert npo_loss(torch.tensor([100.0]), torch.tensor([1.0]), beta=0.5).item() == pytest.approx(0.0, abs=1e-6)


def test_npo_gradient_lowers_the_likelihood_and_vanishes_with_the_gap() -> None:
    near = torch.tensor([1.0], requires_grad=True)
    npo_loss(near, torch.tensor([1.0]), 0.5).backward()
    far = torch.tensor([9.0], requires_grad=True)
    npo_loss(far, torch.tensor([1.0]), 0.5).backward()
    assert near.grad.item() == pytest.approx(-1.0)  # -2 * sigmoid(0)
    assert near.grad.item() < far.grad.item() < 0


def test_masked_mean_is_independent_of_padding() -> None:
    hidden = torch.randn(1, 3, 4)
    padded = torch.cat([hidden, torch.full((1, 2, 4), 50.0)], dim=1)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    control = torch.ones(4)
    torch.testing.assert_close(rmu_forget_loss(padded, control, mask), rmu_forget_loss(hidden, control))


def test_answer_nll_ignores_the_question() -> None:
    """With uniform logits over 4 tokens, each answer token has an NLL of ln 4."""
    nll, tokens = answer_nll(torch.zeros(1, 4, 4), torch.tensor([[-100, -100, 2, 3]]))
    assert tokens.item() == 2
    assert nll.item() == pytest.approx(2 * math.log(4))


def test_bounded_ascent_has_the_values_by_hand() -> None:
    """Logits [ln 3, 0] give token 0 an NLL of ln 4/3 and token 1 one of ln 4. A bound of 1 cuts the latter only."""
    logits = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0], [math.log(3), 0.0], [0.0, 0.0]]], requires_grad=True)
    labels = torch.tensor([[-100, -100, 0, 1]])
    loss = bounded_ascent_loss(logits, labels, max_nll=1.0)
    assert loss.item() == pytest.approx(-(math.log(4 / 3) + 1) / 2)
    loss.backward()
    assert logits.grad[0, 1, 0] > 0  # descent lowers the logit of the answer's token
    assert logits.grad[0, [0, 2, 3]].abs().sum() == 0
    nll, tokens = answer_nll(logits, labels)
    assert bounded_ascent_loss(logits, labels, max_nll=9.0).item() == pytest.approx(-(nll / tokens).item())


def test_simnpo_has_the_values_by_hand() -> None:
    """The loss is -2/beta * log(sigmoid(beta * nll - gamma)), which is 2 ln 2 / beta at beta * nll = gamma."""
    assert simnpo_loss(torch.tensor([0.5]), beta=2.0, gamma=1.0).item() == pytest.approx(math.log(2))
    far = simnpo_loss(torch.tensor([100.0]), beta=2.0, gamma=1.0)
    assert far.item() == pytest.approx(0.0, abs=1e-6)


def test_dpo_has_the_value_by_hand() -> None:
    """With gains of 3 nats (preferred) and -1 nat (rejected), the margin is 4 and the loss log(1 + exp(-0.5 * 4))."""
    loss = dpo_loss(torch.tensor([2.0]), torch.tensor([6.0]), torch.tensor([5.0]), torch.tensor([5.0]), beta=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2.0)))


def test_undial_has_the_value_by_hand() -> None:
    """Lowering reference logits [ln 3, 0] of answer token 0 by ln 3 makes them uniform.

    The cross-entropy with a uniform current model is ln 2. The position of the question is not counted.
    """
    reference = torch.tensor([[[9.0, -9.0], [math.log(3), 0.0], [0.0, 0.0]]])
    loss = undial_loss(torch.zeros(1, 3, 2), reference, torch.tensor([[-100, -100, 0]]), penalty=math.log(3))
    assert loss.item() == pytest.approx(math.log(2))
    pushed = torch.zeros(1, 3, 2, requires_grad=True)
    undial_loss(pushed, torch.zeros(1, 3, 2), torch.tensor([[-100, -100, 0]]), penalty=5.0).backward()
    assert pushed.grad[0, 1, 0] > 0  # descent lowers the answer token's logit
    assert pushed.grad[0, 0].abs().sum() == 0


def test_rerouting_losses_have_the_values_by_hand() -> None:
    reference = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    hidden = torch.tensor([[[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]]])
    assert rerouting_forget_loss(hidden, reference).item() == pytest.approx(1 / 3)  # cosines 1, 0, -1
    assert rerouting_forget_loss(hidden, reference, torch.tensor([[1, 1, 0]])).item() == pytest.approx(1 / 2)
    assert rerouting_retain_loss(hidden, reference, torch.tensor([[1, 0, 1]])).item() == pytest.approx(
        1.5
    )  # distances 1 and 2
    same = reference.clone().requires_grad_()
    rerouting_retain_loss(same, reference).backward()
    assert same.grad.isfinite().all()  # the first step starts at the reference
