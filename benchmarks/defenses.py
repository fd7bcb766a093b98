"""Measures what each defense against relearning adds to an optimizer step, on one CPU thread:

    python benchmarks/defenses.py [--table]

A LLaVA of 15M parameters with random weights takes optimizer steps of npo with refusals and prompt decoupling: 2
questions per role, 16 image tokens and one question per image. The steps of all defenses alternate, so that a change in
the speed of the machine affects all of them. The script prints the median ratio of processor time to the step without
a defense, with the lowest and highest ratio, and writes benchmarks/results/defenses.json. `--table` prints the results
file as the table of docs/methods.md, without measuring.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from steps import SIZES, Batches, build, make_batches

from vlm_unlearn.config import DefenseConfig, MethodConfig, TrainableConfig
from vlm_unlearn.methods import build_method
from vlm_unlearn.methods.wrappers import DEFENSES as REGISTRY
from vlm_unlearn.methods.wrappers import Defense, build_defenses
from vlm_unlearn.modeling.features import FeatureCache, cache_vision_features
from vlm_unlearn.modeling.trainable import prepare_trainable
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.training.defended_step import DefendedStep, StepContext
from vlm_unlearn.training.passes import Passes
from vlm_unlearn.training.references import AdapterReference, FrozenCopyReference, Reference
from vlm_unlearn.training.step import ModelStep

RESULTS = Path(__file__).parent / "results" / "defenses.json"
METHOD = {"name": "npo", "beta": 0.5, "refusal_weight": 1.0}
MODES = {"full": {"mode": "full"}, "lora": {"mode": "lora", "lora": {"r": 16}}}
DEFENSES: dict[str, dict[str, Any]] = {
    "sam": {"name": "sam"},
    "gp": {"name": "gp"},
    "rs": {"name": "rs"},
    "swa": {"name": "swa", "start_step": 1, "interval": 1},
    "lat": {"name": "lat", "layers": [2, 4]},
}
REPEATS = 3
ROWS = 2  # questions per role
IMAGE_TOKENS = 16


class Trained:
    """A model that takes optimizer steps, with a defense or without."""

    def __init__(self, mode: str, defense: dict[str, Any] | None) -> None:
        self.method = build_method(MethodConfig.model_validate(METHOD), 1.0)
        base = VisionLanguageModel(build(SIZES["15M"], IMAGE_TOKENS))
        self.vlm = prepare_trainable(base, TrainableConfig.model_validate(MODES[mode]))
        self.reference: Reference = AdapterReference() if mode == "lora" else FrozenCopyReference(self.vlm.model)
        cache_vision_features(self.vlm.vision_tower, FeatureCache(2**31))
        self.defenses: tuple[Defense, ...] = build_defenses([DefenseConfig.model_validate(defense)]) if defense else ()
        self.parameters = {name: value for name, value in self.vlm.model.named_parameters() if value.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-5)
        self.steps = 0

    def step(self, batches: Batches) -> float:
        """Takes an optimizer step and returns its processor time in seconds."""
        roles: Any = {role: batches[role] for role in self.method.requirements.roles}
        self.vlm.model.train()
        started = time.process_time()
        if any(item.overrides("forget_gradient") or item.overrides("latent_shifts") for item in self.defenses):
            context = StepContext(
                vlm=self.vlm,
                parameters=self.parameters,
                build_step=lambda batch, active: ModelStep(
                    Passes(self.vlm, [batch], self.method, self.reference, active_roles=active)
                ),
                loss=self.method.loss,
                autocast=nullcontext,
                backward=lambda loss: loss.backward(),
                average=None,
                step=self.steps,
                seed=0,
            )
            DefendedStep(context, [roles], self.defenses).run()
        else:
            self.method.loss(ModelStep(Passes(self.vlm, [roles], self.method, self.reference))).total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        for defense in self.defenses:
            defense.after_step(self.parameters, self.steps)
        return time.process_time() - started


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows of a results file as the Markdown table of the docs."""
    lines = ["| defense | full | LoRA | memory |", "|---|---:|---:|---:|"]
    for name in DEFENSES:
        full, lora = (
            next(row for row in rows if (row["defense"], row["trainable"]) == (name, mode)) for mode in ("full", "lora")
        )
        ratios = [f"{row['ratio']:.2f} ({row['low']:.2f}–{row['high']:.2f})" for row in (full, lora)]
        lines.append(f"| `{name}` | {' | '.join(ratios)} | {REGISTRY[name].weight_copies} |")
    return "\n".join(lines)


def main() -> None:
    if "--table" in sys.argv:
        print(table(json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]))
        return
    torch.set_num_threads(1)
    results = []
    for mode in MODES:
        models = {name: Trained(mode, config) for name, config in {"none": None, **DEFENSES}.items()}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for repeat in range(REPEATS + 1):
            batches = make_batches(repeat, 1, IMAGE_TOKENS, ROWS)
            for name, model in models.items():
                elapsed = model.step(batches)
                if repeat:  # the first step is a warm-up
                    seconds[name].append(elapsed)
        for name in DEFENSES:
            ratios = [value / plain for value, plain in zip(seconds[name], seconds["none"], strict=True)]
            row = {"defense": name, "trainable": mode, "options": DEFENSES[name]}
            low, median, high = (round(value, 2) for value in (min(ratios), statistics.median(ratios), max(ratios)))
            results.append({**row, "ratio": median, "low": low, "high": high})
            print(f"{name:<5}{mode:<6}{median:.2f} ({low:.2f} to {high:.2f})", flush=True)
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "rows": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
