"""Defenses on a tiny model: gradients, accumulation, resuming to the bit, LoRA, caches and rejected settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from helpers import raises_code, recipe
from trained import METHOD_CONFIGS, StepScene, changed_names, max_difference, relative_difference, weights
from vlm_unlearn import UnlearningConfig, UnlearningTrainer
from vlm_unlearn.config import DefenseConfig, Recipe, load
from vlm_unlearn.data.encoding import Batch
from vlm_unlearn.methods import METHODS, LossOutput, Method, Role, Step
from vlm_unlearn.methods.wrappers import DEFENSES, Defense, build_defenses
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.training.defended_step import DefendedStep, StepContext
from vlm_unlearn.training.passes import Passes
from vlm_unlearn.training.plan import plan, recipe_name
from vlm_unlearn.training.references import FrozenCopyReference, Reference
from vlm_unlearn.training.runner import run_recipe
from vlm_unlearn.training.step import ModelStep, count_tokens

CONFIGS: dict[str, dict[str, Any]] = {
    "sam": {"name": "sam", "rho": 0.05},
    "gp": {"name": "gp", "weight": 0.05, "radius": 0.05},
    "rs": {"name": "rs", "sigma": 0.01, "samples": 2},
    "swa": {"name": "swa", "start_step": 2, "interval": 2},
    "lat": {"name": "lat", "layers": [0, 1], "epsilon": 0.5, "steps": 2},
}
LORA = {"mode": "lora", "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}}
NPO_REFUSAL = {"name": "npo", "beta": 0.5, "refusal_weight": 1.0}


def defenses_of(*names: str) -> tuple[Defense, ...]:
    return build_defenses([DefenseConfig.model_validate(CONFIGS[name]) for name in names])


class DefendedScene(StepScene):
    """A scene whose steps are computed with defenses."""

    def defended(
        self,
        micro_batches: Sequence[Mapping[Role, Batch]],
        reference: Reference | None,
        defenses: Sequence[Defense] = (),
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Returns the mean terms, with the loss as ``total``, and the gradients of one step."""
        self.model.train()
        vlm = VisionLanguageModel(self.model)
        counts = [count_tokens(batches) for batches in micro_batches]
        totals = {key: sum(count[key] for count in counts) / len(counts) for key in counts[0]}
        torch.manual_seed(0)
        context = StepContext(
            vlm=vlm,
            parameters=self.trainable_parameters(),
            build_step=lambda batches, roles: ModelStep(
                Passes(vlm, [batches], self.method, reference, active_roles=roles), 0, totals, progress=0.25
            ),
            loss=self.method.loss,
            autocast=nullcontext,
            backward=lambda loss: loss.backward(),
            average=None,
            step=0,
            seed=0,
        )
        outputs = DefendedStep(context, micro_batches, defenses).run()
        terms = [{**output.terms, "total": output.total} for output in outputs]
        means = {name: sum(term[name].item() for term in terms) / len(terms) for name in terms[0]}
        return means, {
            name: value.grad.clone() for name, value in self.trainable_parameters().items() if value.grad is not None
        }


@pytest.mark.parametrize("name", METHOD_CONFIGS)
def test_forget_terms_and_other_terms_add_up_to_the_loss_of_every_method(
    tiny_model: Path, training_sets: dict[str, Path], name: str
) -> None:
    """Without a defense, the two passes have the gradients, the loss and the terms of a single one."""
    data, weight = ("harmful", 0.0) if name == "dpo" else ("safe_eraser", 0.5)
    scene = DefendedScene(tiny_model, training_sets[data], METHOD_CONFIGS[name], weight)
    reference = FrozenCopyReference(scene.model)
    scene.perturb()
    batches = scene.micro_batches(rows=4, count=2)
    single = scene.step(batches, reference)
    terms, gradients = scene.defended(batches, reference)
    assert {key: value for key, value in terms.items() if key != "total"} == pytest.approx(single.terms, abs=1e-4)
    assert max_difference(gradients, single.gradients) < 1e-5


@pytest.mark.parametrize("trainable", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["sam", "gp", "rs", "lat"])
def test_defended_step_changes_the_forget_gradient_and_no_weight(
    tiny_model: Path, training_sets: dict[str, Path], name: str, trainable: dict[str, object]
) -> None:
    scene = DefendedScene(tiny_model, training_sets["safe_eraser"], NPO_REFUSAL, 0.5, trainable=trainable)
    reference = FrozenCopyReference(scene.model)
    scene.perturb()
    batches = scene.micro_batches(rows=2, count=2)
    before = {key: value.detach().clone() for key, value in scene.model.named_parameters()}
    storage = {key: value.data_ptr() for key, value in scene.model.named_parameters()}
    _, plain = scene.defended(batches, reference)
    _, gradients = scene.defended(batches, reference, defenses_of(name))
    assert not changed_names(before, dict(scene.model.named_parameters()))
    assert storage == {key: value.data_ptr() for key, value in scene.model.named_parameters()}
    assert gradients.keys() == plain.keys()
    assert 1e-6 < max_difference(gradients, plain) < 1.0


@pytest.mark.parametrize("name", ["sam", "gp", "rs", "lat"])
def test_step_of_four_micro_batches_has_the_defended_gradients_of_one_batch(
    tiny_model: Path, training_sets: dict[str, Path], name: str
) -> None:
    scene = DefendedScene(tiny_model, training_sets["safe_eraser"], NPO_REFUSAL, 0.5)
    reference = FrozenCopyReference(scene.model)
    scene.perturb()
    single = scene.defended(scene.micro_batches(rows=8), reference, defenses_of(name))
    split = scene.defended(scene.micro_batches(rows=2, count=4), reference, defenses_of(name))
    assert split[0] == pytest.approx(single[0], abs=1e-4, rel=1e-3)
    assert max_difference(split[1], single[1]) < 1e-4


def test_sam_has_the_gradient_of_a_model_whose_weights_were_moved_by_hand(
    tiny_model: Path, training_sets: dict[str, Path]
) -> None:
    """The forget gradient is at the moved weights, and the gradient of the retain terms at the original ones."""
    scene = DefendedScene(tiny_model, training_sets["safe_eraser"], {"name": "gd"})
    scene.perturb()
    batches = scene.micro_batches(rows=4)
    gradients = scene.defended(batches, None, defenses_of("sam"))[1]

    def gradient_of(**method: object) -> dict[str, Tensor]:
        scene.method.options = scene.method.options.model_copy(update=method)
        return {name: value.detach() for name, value in scene.step(batches, None).gradients.items()}

    retain = gradient_of(forget_weight=0.0, retain_weight=1.0)
    ascent = gradient_of(forget_weight=1.0, retain_weight=0.0)
    length = torch.cat([value.flatten() for value in ascent.values()]).norm()
    with torch.no_grad():
        for name, value in scene.trainable_parameters().items():
            value.add_(0.05 * ascent[name] / length)
    forget = gradient_of()
    assert max_difference(gradients, {name: forget[name] + retain[name] for name in forget}) < 1e-5


def test_latent_attack_raises_the_forget_loss_of_the_model(tiny_model: Path, training_sets: dict[str, Path]) -> None:
    """The logged terms are those under attack."""
    scene = DefendedScene(tiny_model, training_sets["safe_eraser"], {"name": "npo", "beta": 0.5}, 0.5)
    reference = FrozenCopyReference(scene.model)
    scene.perturb()
    batches = scene.micro_batches(rows=4)
    plain = scene.defended(batches, reference)[0]
    losses = [plain["forget"]]
    for epsilon in (0.1, 1.0, 5.0):
        config = DefenseConfig.model_validate({**CONFIGS["lat"], "epsilon": epsilon, "steps": 4})
        terms = scene.defended(batches, reference, build_defenses([config]))[0]
        losses.append(terms["forget"])
        assert terms["retain"] == pytest.approx(plain["retain"], abs=1e-5)
    assert losses == sorted(losses)
    assert losses[-1] > losses[0] + 0.1


class InterruptedRunError(Exception):
    pass


def interrupt_at(step: int) -> Any:
    def on_step(current: int, steps: int, terms: object) -> None:
        if current == step:
            raise InterruptedRunError

    return on_step


@pytest.mark.parametrize("trainable", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_interrupted_run_resumes_to_the_bit(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, name: str, trainable: dict[str, object]
) -> None:
    """With accumulation and prompt decoupling, interrupted once between two averaged steps."""
    training = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 1}

    def run(folder: str, on_step: Any = None) -> Path:
        return run_recipe(
            recipe(
                tiny_model,
                training_sets["safe_eraser"],
                tmp_path / folder,
                NPO_REFUSAL,
                trainable=trainable,
                training=training,
                prompt_decouple_weight=0.5,
                defense=CONFIGS[name],
            ),
            on_step,
        )

    with pytest.raises(InterruptedRunError):
        run("interrupted", interrupt_at(4))
    assert (tmp_path / "interrupted" / "checkpoints").is_dir()
    models = [run("interrupted"), run("uninterrupted")]
    file = "adapter_model.safetensors" if trainable else "model.safetensors"
    assert (models[0] / file).read_bytes() == (models[1] / file).read_bytes()
    logs = [(tmp_path / folder / "log.jsonl").read_bytes() for folder in ("interrupted", "uninterrupted")]
    assert logs[0] == logs[1]
    losses = [json.loads(line) for line in logs[0].decode().splitlines()]
    assert len(losses) == 6
    assert all({"loss", "forget", "refusal", "retain", "decouple", "grad_norm"} <= line.keys() for line in losses)


def test_defense_is_part_of_the_identity_of_a_run_and_no_defense_is_not(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    """Runs of versions without defenses resume, and a run does not resume with another defense."""

    def identity(**changes: object) -> dict[str, Any]:
        planned: Any = plan(recipe(tiny_model, training_sets["harmful"], tmp_path, "npo", **changes)).identity
        return dict(planned["recipe"])

    assert "defense" not in identity()
    assert identity(defense="sam")["defense"] == identity(defense=[{"name": "sam"}])["defense"] == [{"name": "sam"}]


class Snapshots(TrainerCallback):
    """Keeps the weights after some steps."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = steps
        self.weights: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.weights.append({name: value.detach().clone() for name, value in kwargs["model"].named_parameters()})


def test_swa_trains_the_mean_of_the_weights_and_evaluates_it(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    snapshots = Snapshots([2, 4, 6])
    measured: list[dict[str, Tensor]] = []

    def eval_fn(model: Any) -> dict[str, float]:
        measured.append({name: value.detach().clone() for name, value in model.named_parameters()})
        return {"rate": 0.0}

    trainer = UnlearningTrainer(
        model=str(tiny_model),
        args=UnlearningConfig(
            output_dir=str(tmp_path),
            method="npo",
            defense=CONFIGS["swa"],
            max_steps=6,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            eval_strategy="steps",
            eval_steps=6,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=training_sets["harmful"],
        eval_fn=eval_fn,
        callbacks=[snapshots],
    )
    trainer.train()
    mean = {
        name: torch.stack([values[name] for values in snapshots.weights]).mean(dim=0) for name in snapshots.weights[0]
    }
    trained = dict(trainer.model.named_parameters())
    assert len(snapshots.weights) == 3
    assert max_difference(trained, mean) < 1e-6
    assert changed_names(trained, snapshots.weights[-1])
    assert not changed_names(trained, measured[-1])


def test_sam_with_the_feature_cache_trains_the_same_weights(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    """The vision tower is frozen, and thus not perturbed. The projector, which is perturbed, is not cached."""
    results = []
    for cache in ("memory", "off"):
        training = {"max_steps": 2, "per_device_train_batch_size": 4, "feature_cache": cache}
        config = recipe(
            tiny_model, training_sets["safe_eraser"], tmp_path / cache, "npo", training=training, defense=CONFIGS["sam"]
        )
        results.append(weights(run_recipe(config)))
    assert relative_difference(*results, weights(tiny_model)) < 1e-3


@pytest.mark.parametrize("name", ["rmu", "rr", "kl", "po", "idk_dpo"])
def test_defenses_combine_with_each_other_and_with_any_kind_of_method(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, name: str
) -> None:
    config = recipe(
        tiny_model,
        training_sets["safe_eraser"],
        tmp_path / "run",
        METHOD_CONFIGS[name],
        prompt_decouple_weight=0.5,
        defense=[{**CONFIGS["lat"], "layers": [0]}, "sam", CONFIGS["swa"]],
    )
    assert recipe_name(config) == f"{name}+pd+lat+sam+swa"
    trained = load_file(run_recipe(config) / "model.safetensors")
    assert all(value.isfinite().all() for value in trained.values())


@pytest.mark.parametrize("engine", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_defense_with_a_sharding_engine_is_rejected(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setenv(engine, "true")
    with raises_code("unsupported-setting", field="defense"):
        plan(recipe(tiny_model, training_sets["harmful"], tmp_path, "npo", defense="sam"))


def test_invalid_defenses_of_a_recipe_are_rejected(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    def planned(**changes: object) -> None:
        plan(recipe(tiny_model, training_sets["harmful"], tmp_path, "npo", **changes))

    with raises_code("unknown-name", field="defense"):
        planned(defense="unknown")
    with raises_code("out-of-range", field="defense.layers"):
        planned(defense={"name": "lat", "layers": [9]})
    with raises_code("out-of-range", field="defense.start_step"):
        planned(defense={"name": "swa", "start_step": 5})
    probe = {"suite": "suites/tiny", "keep_best": {"utility": 1.0}}
    with raises_code("conflicting-settings", field="probe.keep_best"):
        planned(defense="swa", probe=probe)


class Product(Method):
    """A loss that cannot be split into forget terms and other terms."""

    def loss(self, step: Step) -> LossOutput:
        forget, retain = step.cross_entropy("forget"), step.cross_entropy("retain")
        return LossOutput(forget * retain, {"forget": forget, "retain": retain})


def test_loss_that_is_no_sum_of_terms_is_rejected(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    model = load_model(tiny_model, "fp32")
    with torch.no_grad():  # the loss of random weights is that of constant logits
        model.get_output_embeddings().weight.mul_(20)
    try:
        config = UnlearningConfig(
            output_dir=str(tmp_path), method=Product, defense="sam", max_steps=1, report_to="none", use_cpu=True
        )
        trainer = UnlearningTrainer(model, config, training_sets["harmful"], load_processor(tiny_model))
        with raises_code("unsupported-setting", field="defense"):
            trainer.train()
    finally:
        METHODS.unregister("Product")


@pytest.mark.parametrize("value", ["sam", {"name": "sam"}, ["sam", {"name": "swa", "start_step": 1}], None])
def test_defense_of_a_config_is_a_name_a_mapping_a_list_or_none(tmp_path: Path, value: Any) -> None:
    config = UnlearningConfig(output_dir=str(tmp_path), defense=value, report_to="none", use_cpu=True)
    assert len(config.build_defenses()) == (0 if value is None else 1 if not isinstance(value, list) else 2)


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("defense: sam", ["defense.rho=0.5"], [{"name": "sam", "rho": 0.5}]),
        ("defense: {name: sam, rho: 0.1}", [], [{"name": "sam", "rho": 0.1}]),
        ("defense: [sam, {name: swa, interval: 3}]", [], [{"name": "sam"}, {"name": "swa", "interval": 3}]),
        ("defense: [sam, {name: swa}]", ["defense.swa.interval=2"], [{"name": "sam"}, {"name": "swa", "interval": 2}]),
        ("defense: sam", ["defense=[]"], []),
        ("", ["defense=rs"], [{"name": "rs"}]),
        ("", [], []),
    ],
)
def test_defense_of_a_recipe_is_a_name_a_mapping_or_a_list(
    tmp_path: Path, text: str, overrides: list[str], expected: list[dict[str, object]]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: m\ndata: d\noutput: o\nmethod: npo\n{text}\n")
    assert [config.model_dump() for config in load(Recipe, file, overrides).defense] == expected


def test_all_defenses_are_tested() -> None:
    assert sorted(CONFIGS) == sorted(DEFENSES.built_in)
