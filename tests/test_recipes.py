"""Shipped recipes and suites load and have the published settings. accelerate reads every engine file."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from vlm_unlearn.config import Recipe, RobustnessSuite, Suite, Sweep, load, shipped_path
from vlm_unlearn.evaluation.benchmarks import SPECIFICITY_BENCHMARKS
from vlm_unlearn.methods import build_method
from vlm_unlearn.robustness.base import build_model_attack

RECIPES = Path(__file__).parents[1] / "recipes"
ENGINES = sorted((RECIPES / "engines").glob("*.yaml"))
SAFETY_SETS = {  # the metrics of the suites of other safety sets
    "mm_safetybench": {"asr", "asr_sd", "asr_typo", "degenerate_rate"},
    "figstep": {"asr", "asr_attacked", "degenerate_rate"},
    "spa_vl": {"asr", "refusal_rate", "utility", "degenerate_rate"},
    "mossbench": {"refusal_rate", "utility", "degenerate_rate"},
    "xstest": {"asr", "refusal_rate", "utility", "degenerate_rate"},
}
ROBUSTNESS_SUITES = sorted((RECIPES / "suites").glob("*robustness*.yaml"))
SUITES = sorted(set((RECIPES / "suites").glob("*.yaml")) - set(ROBUSTNESS_SUITES))
SWEEPS = sorted((RECIPES / "sweeps").glob("*.yaml"))
# A leading underscore marks a base that is only extended.
RUNS = sorted(
    file
    for file in RECIPES.rglob("*.yaml")
    if file not in ENGINES + SUITES + ROBUSTNESS_SUITES + SWEEPS and not file.stem.startswith("_")
)
MODELS = {
    "7b": "llava-hf/llava-1.5-7b-hf",
    "13b": "llava-hf/llava-1.5-13b-hf",
    "llama_3.2": "meta-llama/Llama-3.2-11B-Vision-Instruct",
}


def name_of(file: Path) -> str:
    return str(file.relative_to(RECIPES))[: -len(".yaml")]


def recipe_of(name: str, *overrides: str) -> Recipe:
    return load(Recipe, Path(name), ["data=d", "output=o", *overrides])


def test_every_published_run_has_a_recipe() -> None:
    mirage = {
        f"{run}_{size}"
        for run in ("npo_full", "npo_full_generic", "npo_lora", "rmu_full", "rmu_lora")
        for size in ("7b", "13b")
    }
    eraser = {f"{method}{pd}_{model}" for method in ("ga", "gd", "kl", "po") for pd in ("", "_pd") for model in MODELS}
    eraser |= {"sine_po_pd_7b", "sine_po_pd_13b"}
    names = {name_of(file) for file in RUNS if file.parent.name != "tiny"}
    assert names == {f"safety_mirage/{name}" for name in mirage} | {f"safe_eraser/{name}" for name in eraser}


@pytest.mark.parametrize("file", RUNS, ids=name_of)
def test_recipe_loads_and_its_method_accepts_its_options(file: Path) -> None:
    tiny = file.parent.name == "tiny"
    recipe = recipe_of(name_of(file), *(["model=m"] if tiny else []))
    assert shipped_path(name_of(file)) == file
    assert build_method(recipe.method, recipe.prompt_decouple_weight)
    if not tiny:
        assert recipe.model == next(model for ending, model in MODELS.items() if file.stem.endswith("_" + ending))


@pytest.mark.parametrize("file", SWEEPS, ids=name_of)
def test_sweep_loads_and_all_of_its_settings_are_valid(file: Path) -> None:
    pytest.importorskip("optuna")
    from vlm_unlearn.sweeps.measurement import Measurement
    from vlm_unlearn.sweeps.space import Space

    sweep = load(Sweep, Path(name_of(file)), ["overrides.data=d", "suite_overrides.root=/data"])
    if file.stem == "tiny":
        sweep = sweep.model_copy(update={"overrides": {"data": "d", "model": "m"}})
    Space(sweep).check()
    if file.stem != "tiny":
        assert len(Space(sweep).grid()) == (12 if "mirage" in file.stem else 8)
        sweep = sweep.model_copy(update={"suite_overrides": {"root": "/data", "judge": {"name": "keyword"}}})
        assert Measurement(sweep)


@pytest.mark.parametrize("file", SUITES, ids=name_of)
def test_suite_loads_with_all_metrics(file: Path) -> None:
    suite = load(Suite, Path(name_of(file)), ["model=m", "root=/data"])
    assert all(str(split.file).startswith("/data/") for split in suite.splits)
    assert all(str(file).startswith("/data/") for benchmark in suite.benchmarks for file in benchmark.annotations)
    metrics = {"asr", "asr_attacked", "refusal_rate", "refusal_rate_attacked", "degenerate_rate"}
    if file.stem == "safe_eraser":
        metrics = {
            "sarr",
            "rouge_l",
            "answer_score",
            "degenerate_rate",
            *(f"{x}_{y}" for x in ("efficacy", "generality") for y in ("asr", "rr")),
        }
    if file.stem == "tiny_attacks":
        attacks = ("prefill", "in_context", "sampling", "image_noise")
        metrics = {"asr", *(f"asr_{name}{control}" for name in attacks for control in ("", "_control"))}
        metrics |= {"asr_no_image", "asr_blank_image", "asr_shuffled_image"}
    metrics = SAFETY_SETS.get(file.stem, metrics)
    assert metrics <= suite.metrics.keys() or (file.stem == "specificity" and not suite.splits)


@pytest.mark.parametrize("file", ROBUSTNESS_SUITES, ids=name_of)
def test_robustness_suite_loads_and_its_attacks_accept_their_options(file: Path) -> None:
    suite = load(RobustnessSuite, Path(name_of(file)), ["root=/data"])
    assert str(suite.questions.file).startswith("/data/")
    for budget in ("small", "full"):
        assert suite.attacks(budget)
        assert all(build_model_attack(config) for config in suite.attacks(budget))


def test_specificity_has_its_seven_benchmarks() -> None:
    suite = load(Suite, Path("suites/specificity"), ["model=m", "root=/data"])
    assert {benchmark.name: len(benchmark.annotations) for benchmark in suite.benchmarks} == {
        **dict.fromkeys(SPECIFICITY_BENCHMARKS, 1),
        "pope": 3,
    }
    assert suite.judges["mm_vet"].rubric == "mm_vet"


def test_npo_full_has_the_settings_of_its_script() -> None:
    recipe = recipe_of("safety_mirage/npo_full_7b")
    training = recipe.training
    assert recipe.method.model_extra == {
        "beta": 0.9,
        "forget_weight": 1.0,
        "retain_npo_weight": 1.0,
        "retain_weight": 1.0,
        "paper_compat": True,
    }
    assert (training.num_train_epochs, training.per_device_train_batch_size, training.gradient_accumulation_steps) == (
        1,
        1,
        1,
    )
    assert (training.learning_rate, training.lr_scheduler_type, training.warmup_ratio, training.weight_decay) == (
        5e-7,
        "cosine",
        0.03,
        0,
    )
    assert (training.max_length, training.gradient_checkpointing) == (2048, "auto")
    assert (recipe.trainable.mode, recipe.trainable.layers, recipe.trainable.projector) == ("full", None, True)
    assert recipe.image_aspect_ratio == "pad"


def test_rmu_full_has_the_settings_of_the_generic_script() -> None:
    recipe = recipe_of("safety_mirage/rmu_full_7b")
    assert recipe.method.model_extra == {
        "layer": 7,
        "steering_coefficient": 10,
        "alpha": 1.0,
        "retain_weight": 1.0,
        "paper_compat": True,
    }
    assert (
        recipe.training.num_train_epochs,
        recipe.training.per_device_train_batch_size,
        recipe.training.learning_rate,
    ) == (10, 1, 1e-6)
    assert (recipe.trainable.layers, recipe.trainable.parameter_patterns) == ([5, 6, 7], ["mlp.down_proj"])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (
            "npo",
            {"beta": 0.7, "forget_weight": 1.0, "retain_npo_weight": 0.0, "retain_weight": 1.0, "paper_compat": True},
        ),
        ("rmu", {"layer": 15, "steering_coefficient": 10, "alpha": 0.0, "retain_weight": 1.2, "paper_compat": True}),
    ],
)
def test_lora_recipes_have_the_settings_of_the_generic_lora_script(method: str, options: dict[str, object]) -> None:
    recipe = recipe_of(f"safety_mirage/{method}_lora_7b")
    assert recipe.method.model_extra == options
    assert (recipe.trainable.mode, recipe.trainable.lora.r, recipe.trainable.lora.lora_alpha) == ("lora", 128, 256)
    assert (recipe.training.num_train_epochs, recipe.training.per_device_train_batch_size) == (10, 8)
    assert recipe.training.learning_rate == recipe.training.projector_learning_rate == 1.1e-5


@pytest.mark.parametrize(
    ("name", "options", "decouple"),
    [
        ("ga", {"forget_weight": 1.0, "paper_compat": True}, 0),
        ("ga_pd", {"forget_weight": 1.0, "paper_compat": True}, 0.5),
        ("gd", {"forget_weight": 1.0, "retain_weight": 1.0, "paper_compat": True}, 0),
        ("gd_pd", {"forget_weight": 1.0, "retain_weight": 0.5, "paper_compat": True}, 0.5),
        ("kl", {"forget_weight": 1.0, "kl_weight": 1.0, "paper_compat": True}, 0),
        ("kl_pd", {"forget_weight": 1.0, "kl_weight": 1.0, "paper_compat": True}, 1),
        ("po", {"paper_compat": True}, 0),
        ("po_pd", {"paper_compat": True}, 1),
    ],
)
def test_safe_eraser_recipes_have_the_published_loss_weights(
    name: str, options: dict[str, object], decouple: float
) -> None:
    for model in MODELS:
        recipe = recipe_of(f"safe_eraser/{name}_{model}")
        assert recipe.method.name == name.removesuffix("_pd")
        assert (recipe.method.model_extra, recipe.prompt_decouple_weight) == (options, decouple)


def test_safe_eraser_recipes_have_the_published_hyperparameters() -> None:
    recipe = recipe_of("safe_eraser/ga_13b")
    training, lora = recipe.training, recipe.trainable.lora
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (32, 256, 0.05)
    assert lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert (recipe.trainable.mode, recipe.trainable.projector, recipe.trainable.vision_tower) == ("lora", True, False)
    assert 2 * training.per_device_train_batch_size * training.gradient_accumulation_steps == 32
    assert (training.num_train_epochs, training.learning_rate, training.lr_scheduler_type, training.warmup_ratio) == (
        10,
        1e-4,
        "cosine",
        0.06,
    )
    assert (training.weight_decay, training.max_grad_norm, training.seed) == (0.01, 1.0, 233)
    assert training.max_length == 512 - 1 + 576  # the published 512 counts the image as one token
    assert recipe_of("safe_eraser/ga_llama_3.2").training.max_length == 512


def test_sine_recipe_differs_from_po_pd_only_in_the_projector() -> None:
    plain = recipe_of("safe_eraser/po_pd_7b").model_dump()
    sine = recipe_of("safe_eraser/sine_po_pd_7b").model_dump()
    assert sine["trainable"].pop("projector") == "sine"
    assert plain["trainable"].pop("projector") is True
    assert (sine.pop("name"), plain.pop("name")) == ("po+pd+sine", "")
    assert sine == plain


def launch_arguments(file: Path, *more: str) -> Namespace:
    """The arguments that ``accelerate launch`` reads from an engine file."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    parsed = launch_command_parser().parse_args(
        ["--config_file", str(file), *more, "-m", "vlm_unlearn.cli.main", "train"]
    )
    arguments: Namespace = _validate_launch_command(parsed)[0]
    return arguments


@pytest.mark.parametrize("file", ENGINES, ids=name_of)
def test_accelerate_accepts_every_key_of_an_engine_file(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(file))  # unknown keys are an error
    assert config.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[file.stem]
    assert (config.num_machines, config.num_processes, config.mixed_precision) == (1, 8, "no")
    arguments = launch_arguments(
        file, "--num_machines", "2", "--num_processes", "16", "--machine_rank", "1", "--main_process_ip", "node0"
    )
    assert (arguments.num_machines, arguments.num_processes, arguments.machine_rank) == (2, 16, 1)
    arguments_of_launch = set(vars(launch_command_parser().parse_args(["train.py"])))
    assert {
        *config.fsdp_config,
        *config.deepspeed_config,
    } <= arguments_of_launch  # accelerate checks the keys of the first level only


def test_fsdp2_engine_configures_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_arguments(RECIPES / "engines" / "fsdp2.yaml", "--main_process_port", "0")
    for key, value in prepare_multi_gpu_env(arguments).items():
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, False)
    assert str(plugin.state_dict_type) == "StateDictType.FULL_STATE_DICT"
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer", "CLIPEncoderLayer"]
    assert not plugin.activation_checkpointing


def test_zero3_engine_configures_deepspeed() -> None:
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    arguments = launch_arguments(RECIPES / "engines" / "zero3.yaml", "--main_process_port", "0")
    arguments.deepspeed_fields_from_accelerate_config = ""
    _, environment = prepare_deepspeed_cmd_env(arguments)
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"
    assert arguments.deepspeed_multinode_launcher == "standard"
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in environment  # the recipe's


PUBLISHED = [name_of(file) for file in RUNS if file.parent.name in ("safety_mirage", "safe_eraser")]


# A plan of each mode, of each kind of reference, and with each projector.
FAST_PLANS = {
    *("safety_mirage/npo_full_7b", "safety_mirage/rmu_lora_7b"),
    *("safe_eraser/ga_7b", "safe_eraser/kl_pd_7b", "safe_eraser/sine_po_pd_7b"),
}


@pytest.mark.parametrize(
    "name", [name if name in FAST_PLANS else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]
)
def test_every_published_recipe_has_a_plan(name: str, training_sets: dict[str, Path]) -> None:
    """The plan needs no weights and no network, because the shapes of the published models are built in."""
    from vlm_unlearn.config import load
    from vlm_unlearn.training.preview import preview

    data = training_sets["safe_eraser" if name.startswith("safe_eraser") else "harmful"]
    result = preview(load(Recipe, Path(name), [f"data={data}", "output=run"]))
    billions = {"7b": 7.06, "13b": 13.35, "3.2": 10.67}[name.rsplit("_", 1)[-1]]
    base = sum(total for component, _, total in result.trainable if component != "adapters")
    assert base == pytest.approx(billions * 1e9, rel=0.01)
    assert {component: trained for component, trained, _ in result.trainable}["vision tower"] == 0
    assert result.tokens_per_sample["forget"] > (576 if "3.2" not in name else 5)
    assert 0 < result.memory.devices(80e9) <= 8
    assert result.steps > 0


DOCS = Path(__file__).parents[1] / "docs"
BLOCKS = [
    (file.name, number, block)
    for file in (DOCS / "training.md", DOCS / "published.md")
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", file.read_text(encoding="utf-8"), flags=re.S))
]


@pytest.mark.parametrize(("name", "number", "block"), BLOCKS, ids=[f"{name}-{number}" for name, number, _ in BLOCKS])
def test_yaml_block_of_the_docs_is_a_recipe(name: str, number: int, block: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(block if "extends:" in block or "method:" in block else f"method: npo\n{block}")
    recipe = load(Recipe, file, ["model=m", "data=d", "output=o"])
    keys = yaml.safe_load(block).keys()
    assert keys - {"extends"} <= recipe.model_fields_set
