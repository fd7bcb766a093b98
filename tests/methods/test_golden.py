"""The total loss of each method of both papers equals the published expression on the golden inputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm_unlearn.config import MethodConfig
from vlm_unlearn.losses import answer_mask, answer_nll
from vlm_unlearn.methods import METHODS, build_method

CASES = json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text())


class GoldenStep:
    """Implements `vlm_unlearn.methods.Step` on the golden inputs."""

    progress = 0.25

    def __init__(self, case: dict[str, Any]) -> None:
        roles = ("forget", "retain", "decouple")
        self._branches = {role: {key: torch.tensor(value) for key, value in case[role].items()} for role in roles}
        self._branches["forget"]["reference_hidden"] = self._branches["forget"]["hidden"] + 1

    def _answer(self, role: str, key: str = "logits") -> tuple[Tensor, Tensor]:
        return answer_nll(self._branches[role][key], self._branches[role]["labels"])

    def nll(self, role: str, reduction: str = "mean") -> Tensor:
        nll, tokens = self._answer(role)
        return nll / tokens if reduction == "mean" else nll

    def reference_nll(self, role: str, reduction: str = "mean") -> Tensor:
        nll, tokens = self._answer(role, "reference_logits")
        return nll / tokens if reduction == "mean" else nll

    def cross_entropy(self, *roles: str) -> Tensor:
        answers = [self._answer(role) for role in roles]
        return sum(nll.sum() for nll, _ in answers) / sum(tokens.sum() for _, tokens in answers)

    def micro_batch_nll(self, role: str) -> tuple[Tensor, Tensor]:
        nll, tokens = self._answer(role, "reference_logits")
        return self.cross_entropy(role), nll.sum() / tokens.sum()

    def logits(self, role: str) -> Tensor:
        return self._branches[role]["logits"]

    def reference_logits(self, role: str) -> Tensor:
        return self._branches[role]["reference_logits"]

    def labels(self, role: str) -> Tensor:
        return self._branches[role]["labels"]

    def hidden(self, role: str, layer: int) -> Tensor:
        return self._branches[role]["hidden"]

    def reference_hidden(self, role: str, layer: int) -> Tensor:
        return self._branches[role]["reference_hidden"]

    def attention_mask(self, role: str) -> Tensor:
        return self._branches[role]["attention_mask"]

    def answer_mask(self, role: str) -> Tensor:
        return answer_mask(self._branches[role]["labels"])

    def token_weight(self, role: str, kind: str) -> Tensor:
        return torch.tensor(1.0)


def total(case: dict[str, Any], weight: float = 0.0, **method: Any) -> float:
    built = build_method(MethodConfig.model_validate(method), weight)
    inner: Any = getattr(built, "method", built)
    if inner.name == "rmu":
        direction = torch.tensor(case["control_direction"])
        inner.control_vector = direction / direction.norm() * case["steering_coefficient"]
    output = built.loss(GoldenStep(case))  # type: ignore[arg-type]
    assert all(term.dim() == 0 for term in output.terms.values())
    return output.total.item()


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_losses_of_safe_eraser_match_the_golden_values(case: dict[str, Any]) -> None:
    expect = case["expect"]
    l_f, l_pd = expect["batch_token_mean_nll_forget"], expect["batch_token_mean_nll_decouple"]
    totals = {
        "ga": total(case, name="ga"),
        "ga_pd": total(case, 0.5, name="ga"),
        "gd": total(case, name="gd"),
        "gd_pd": total(case, 0.5, name="gd", retain_weight=0.5),
        "kl_total": total(case, name="kl", paper_compat=True),
        "kl_pd": total(case, 1.0, name="kl", paper_compat=True),
        "po": total(case, name="po"),
        "po_pd": total(case, 1.0, name="po"),
    }
    assert totals == {name: pytest.approx(expect[name], abs=1e-5) for name in totals}
    assert total(case, name="kl") == pytest.approx(-l_f + expect["kl_answer_tokens"], abs=1e-5)
    assert total(case, 1.0, name="kl") == pytest.approx(-l_f + expect["kl_answer_tokens"] + l_pd, abs=1e-5)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_losses_of_safety_mirage_match_the_golden_values(case: dict[str, Any]) -> None:
    expect, beta, alpha = case["expect"], case["beta"], case["rmu_retain_alpha"]
    ce = expect["batch_token_mean_nll_retain"]
    published = total(case, name="npo", beta=beta, retain_npo_weight=1.0, paper_compat=True)
    assert published == pytest.approx(expect["npo_forget_batch_mean"] + expect["npo_retain_batch_mean"] + ce, abs=1e-5)
    assert total(case, name="npo", beta=beta) == pytest.approx(expect["npo_forget_per_sample_mean"] + ce, abs=1e-5)
    for paper_compat, positions in ((True, "all_positions"), (False, "masked")):
        expected = expect[f"rmu_forget_{positions}"] + expect[f"rmu_retain_{positions}"] + 1.2 * ce
        assert total(case, name="rmu", alpha=alpha, retain_weight=1.2, paper_compat=paper_compat) == pytest.approx(
            expected, abs=1e-5
        )


@pytest.mark.parametrize("name", sorted(METHODS))
def test_prompt_decoupling_wraps_the_method_only_above_weight_zero(name: str) -> None:
    method = build_method(MethodConfig(name=name), 0.0)
    assert not hasattr(method, "method")
    decoupled = build_method(MethodConfig(name=name), 0.5)
    roles = (*method.requirements.roles, "decouple")
    assert decoupled.requirements == replace(method.requirements, roles=roles)
    assert decoupled.append_answer_to_prompt == method.append_answer_to_prompt
    assert decoupled.preferred_answers == method.preferred_answers


def test_rr_moves_its_weight_from_forget_to_retain_over_the_run() -> None:
    """At step t of T: alpha * (1 - t/2T) on forget and alpha * t/2T on retain; a quarter through, 0.875 and 0.125."""
    case = CASES[1]
    built = build_method(MethodConfig.model_validate({"name": "rr", "layers": [0, 1], "alpha": 2.0}), 0.0)
    output = built.loss(GoldenStep(case))  # type: ignore[arg-type]
    terms = {name: value.item() for name, value in output.terms.items()}
    assert output.total.item() == pytest.approx(2.0 * (0.875 * terms["forget"] + 0.125 * terms["retain_hidden"]))
