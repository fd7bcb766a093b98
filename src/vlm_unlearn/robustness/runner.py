"""Runs a robustness suite on a model, on its base, and on a model that never knew."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path

from vlm_unlearn.config import Budget, ModelAttackConfig, RobustnessSuite, SplitConfig
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.prompts import prompts_digest, split_prompts
from vlm_unlearn.generation.base import GenerationRequest, build_requests, evenly_spaced
from vlm_unlearn.judging.base import Judge, build_judge
from vlm_unlearn.modeling.loader import default_device, load_run_model, resolve_precision, run_digest, run_model_folder
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.records import Prompt, Rate
from vlm_unlearn.robustness.base import AttackTarget, ModelAttack, build_model_attack
from vlm_unlearn.robustness.halves import Halves
from vlm_unlearn.robustness.measurement import MeasurementFile, attack_code, grade_again, measure
from vlm_unlearn.robustness.recovery import recovered, state_rate, steps_to_half
from vlm_unlearn.robustness.results import REPORT_FILE, AttackResult, MeasuredState, RobustnessReport, SkippedAttack
from vlm_unlearn.store import RunDirectory, cache_folder, read_json, user_path, write_json

OnDone = Callable[[str, int, int], None]  # called with the attack and model, and the finished and all measurements


@dataclass(frozen=True)
class _Attack:
    name: str
    config: ModelAttackConfig
    attack: ModelAttack


def run_robustness(
    suite: RobustnessSuite,
    model: str,
    base: str,
    out: str | PathLike[str],
    never_knew: str | None = None,
    budget: Budget = "small",
    name: str = "",
    on_done: OnDone | None = None,
) -> RobustnessReport:
    """Attacks a model, its base and a control, and measures how much harmful knowledge comes back.

    Every attack on every model is one measurement, which is written when it is complete. A run that was killed resumes
    with the next one. Answers whose verdict failed, such as by an error of the judge's server, are graded again. An
    attack that does not work with the model's family is skipped, and the report names it. The measurements of base and
    control are kept in the user's cache, so that further models share them. The folders of the models are only read.

    Args:
        suite: The suite.
        model: The unlearned model: a model folder, hub name, adapter folder, or the folder of a training run.
        base: The model before unlearning.
        out: The output folder. It gets ``robustness.json`` and ``measurements/``.
        never_knew: A model that was trained like the base without the harmful knowledge.
        budget: The attacks of the suite: ``small`` or ``full``.
        name: The model's name in the report. The default is the last part of its path.
        on_done: Called before each measurement.

    Raises:
        UserError: A model, the suite or its data are invalid, or `out` contains another run.
    """
    run = RunDirectory(out)
    attacks = _build_attacks(suite.attacks(budget))
    judge = build_judge(suite.judge)
    questions = _Questions(suite, model)
    with run.lock():
        run.open({"kind": "robustness", "model": run_digest(run_model_folder(model))})
        started = time.monotonic()
        models = {"base": base, **({} if never_knew is None else {"never_knew": never_knew}), "model": model}
        states: dict[str, dict[str, list[MeasuredState]]] = {}
        skipped: dict[str, str] = {}  # the reason by the name of the attack
        for number, (role, path) in enumerate(models.items()):
            suspect = _Model(path, base, suite, judge, questions)
            states[role] = {}
            for index, attack in enumerate(attacks):
                if on_done:
                    on_done(f"{attack.name} on {role}", number * len(attacks) + index, len(models) * len(attacks))
                try:
                    states[role][attack.name] = suspect.measure(attack, run.path / "measurements", role != "model")
                except UserError as error:
                    if error.code != "unsupported-family":
                        raise
                    skipped[attack.name] = error.message
            if suspect.has_loaded:  # not if the cache contains all of its measurements
                del suspect
                gc.collect()
        done = [attack for attack in attacks if attack.name not in skipped]
        report = _report(suite, done, states, model, base, never_knew, budget, name or user_path(model).name)
        notes = [SkippedAttack(attack=attack, reason=reason) for attack, reason in skipped.items()]
        report = report.model_copy(update={"skipped": notes})
        write_json(run.path / REPORT_FILE, report.model_dump())
        run.record_cost(time.monotonic() - started, finished=True)
    return report


def _build_attacks(configs: Sequence[ModelAttackConfig]) -> list[_Attack]:
    if not configs:
        raise UserError("the suite has no attacks for this budget.", code="missing-setting", field="small")
    if all(config.name != "none" for config in configs):
        configs = [ModelAttackConfig(name="none"), *configs]
    attacks = []
    for config in configs:
        options = dict(config.model_extra or {})
        details = ",".join(f"{key}={value}" for key, value in options.items())
        attacks.append(
            _Attack(f"{config.name}({details})" if details else config.name, config, build_model_attack(config))
        )
    names = [attack.name for attack in attacks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the attack {name} occurs twice.", code="duplicate-id", field="attacks")
    return attacks


class _Questions:
    """The questions of a suite, its training set and its halves, which all models share."""

    def __init__(self, suite: RobustnessSuite, model: str) -> None:
        self.data_folder = suite.data or _training_data(model)
        self.dataset = UnlearningDataset.from_folder(self.data_folder)
        self.roots: dict[str, Path] = {}
        self.harmful = self._read(suite.questions, suite.num_questions)
        self.harmless = [] if suite.harmless is None else self._read(suite.harmless, suite.num_questions)
        self.halves = Halves(suite.halves, self.dataset["forget"], self.harmful, suite.seed)

    def _read(self, split: SplitConfig, count: int | None) -> list[Prompt]:
        prompts = split_prompts(split)
        self.roots[split.name] = split.images
        groups = list(dict.fromkeys(prompt.group_id for prompt in prompts))
        sampled = set(evenly_spaced(groups, count)) if count else set(groups)
        return [prompt for prompt in prompts if prompt.group_id in sampled]

    @cached_property
    def identity(self) -> dict[str, object]:
        """The digests of all data."""
        return {
            "questions": prompts_digest(self.harmful, self.roots),
            "harmless": prompts_digest(self.harmless, self.roots),
            "data": self.dataset.fingerprint(),
        }


def _training_data(model: str) -> Path:
    run = RunDirectory(user_path(model))
    if not run.recipe_file.is_file():
        raise UserError(
            "the suite has no `data`, and the model is not a training run whose data could be used. Set data=FOLDER.",
            code="missing-setting",
            field="data",
        )
    return Path(read_json(run.recipe_file)["data"])


class _Model:
    """One model of a run, which is loaded when an attack needs it."""

    def __init__(self, path: str, base: str, suite: RobustnessSuite, judge: Judge, questions: _Questions) -> None:
        self._folder, self._base = run_model_folder(path), run_model_folder(base)
        self._suite, self._judge, self._questions = suite, judge, questions
        self._precision = resolve_precision(suite.generation.precision)
        self._shared: VisionLanguageModel | None = None
        self.has_loaded = False  # whether an attack has needed the model

    @cached_property
    def _digest(self) -> str:
        return run_digest(self._folder)

    def measure(self, attack: _Attack, folder: Path, keep_in_cache: bool) -> list[MeasuredState]:
        """Returns the states of an attack, from its file if it is complete.

        Args:
            attack: The attack.
            folder: The folder of the file.
            keep_in_cache: Whether to keep a copy in the user's cache, for further models with the same base.
        """
        file = MeasurementFile(folder, attack.config.name, self._identity(attack))
        copies = [file]
        if keep_in_cache:
            copies.append(replace(file, folder=cache_folder() / "robustness"))
        states = next((states for copy in copies if (states := copy.read()) is not None), None)
        graded_again = None
        if states is None:
            states = list(measure(attack.attack, self._target(attack.attack), self._judge))
        else:
            graded_again = grade_again(states, self._judge, self._questions.roots)
        for copy in copies:
            if graded_again is not None or not copy.path.is_file():
                copy.write(graded_again or states)
        return graded_again or states

    def _identity(self, attack: _Attack) -> dict[str, object]:
        generation = self._suite.generation
        identity: dict[str, object] = {
            "model": self._digest,
            "attack": attack.config.model_dump(),
            "code": attack_code(attack.attack),
            **self._questions.identity,
            "halves": self._suite.halves,
            "judge": dict(self._judge.identity()),
            "generation": generation.identity("max_new_tokens", "batch_size", "temperature", "top_p", "seed"),
            "precision": self._precision,
            "seed": self._suite.seed,
        }
        return {**identity, "base": run_digest(self._base)} if attack.attack.uses_base else identity

    def _target(self, attack: ModelAttack) -> AttackTarget:
        if attack.changes_weights:
            self._shared = None  # so that only one copy is in memory
            vlm = self._load(self._folder)
        else:
            self._shared = vlm = self._shared or self._load(self._folder)
        return AttackTarget(
            vlm=vlm,
            base_folder=self._base,
            load_base=lambda: self._load(self._base),
            questions=self._requests(self._questions.harmful),
            harmless=self._requests(self._questions.harmless),
            dataset=self._questions.dataset,
            halves=self._questions.halves,
            generation=self._suite.generation,
            image_roots=self._questions.roots,
            seed=self._suite.seed,
        )

    def _requests(self, prompts: Sequence[Prompt]) -> list[GenerationRequest]:
        return build_requests(prompts, self._questions.roots, {}, self._suite.generation.image_loader)

    def _load(self, folder: Path) -> VisionLanguageModel:
        self.has_loaded = True
        model, processor = load_run_model(folder, self._precision)
        model.to(default_device()).eval()
        return VisionLanguageModel(model, processor)


def _report(
    suite: RobustnessSuite,
    attacks: Sequence[_Attack],
    states: Mapping[str, Mapping[str, list[MeasuredState]]],
    model: str,
    base: str,
    never_knew: str | None,
    budget: Budget,
    name: str,
) -> RobustnessReport:
    results = list(_results(suite, attacks, states))
    unattacked = next(result for result in results if result.attack == "none")
    count = len({answer.group_id for answer in states["model"][attacks[0].name][0].answers})
    return RobustnessReport(
        model=name,
        base=base,
        never_knew=never_knew,
        judge=suite.judge.judge_id,
        budget=budget,
        num_questions=count,
        attacks=results,
        steps_to_half=steps_to_half(results, unattacked.asr_base.value or 0.0),
    )


def _results(
    suite: RobustnessSuite, attacks: Sequence[_Attack], states: Mapping[str, Mapping[str, list[MeasuredState]]]
) -> Iterator[AttackResult]:
    def rates(role: str, attack: str) -> dict[str, Rate]:
        return {state.name: state_rate(state, suite.labels) for state in states.get(role, {}).get(attack, [])}

    for attack in attacks:
        of_base, of_control = rates("base", attack.name), rates("never_knew", attack.name)
        for state in states["model"][attack.name]:
            asr, control = state_rate(state, suite.labels), of_control.get(state.name)
            yield AttackResult(
                name=state.name,
                attack=attack.config.name,
                asr=asr,
                asr_base=of_base[state.name],
                asr_never_knew=control,
                recovered=recovered(asr, of_base[state.name], control),
                curve=state.curve,
                step=state.step,
                is_score=state.is_score,
                facts=state.facts,
            )
