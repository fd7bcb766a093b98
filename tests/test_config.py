"""Recipes and suites: loading, extending, overriding, and errors with the nearest valid key."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from helpers import raises_code
from vlm_unlearn.config import Recipe, Suite, load
from vlm_unlearn.config.base import nested_configs
from vlm_unlearn.methods import METHODS

MINIMAL = "model: m\ndata: d\noutput: o\nmethod: npo\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_overrides_reach_nested_keys_and_read_exponents(tmp_path: Path) -> None:
    recipe = load(
        Recipe, write(tmp_path, MINIMAL), ["training.learning_rate=1e-4", "method.beta=0.5", "trainable.mode=lora"]
    )
    assert recipe.training.learning_rate == 1e-4
    assert (recipe.method.name, recipe.method.model_extra) == ("npo", {"beta": 0.5})
    assert recipe.trainable.mode == "lora"


@pytest.mark.parametrize(
    ("text", "overrides", "code", "field", "suggestion"),
    [
        (MINIMAL + "trainning: {}\n", [], "unknown-key", "trainning", '"training"'),
        (MINIMAL, ["training.learning_rat=1"], "unknown-key", "training.learning_rat", '"learning_rate"'),
        (MINIMAL, ["trainable.lora.rr=4"], "unknown-key", "trainable.lora.rr", ""),
        (MINIMAL, ["training.lr=1"], "unknown-key", "training.lr", '"learning_rate"'),
        (MINIMAL, ["lr=1"], "unknown-key", "lr", '"training.learning_rate"'),
        (MINIMAL, ["seed=1"], "unknown-key", "seed", '"training.seed"'),
        (MINIMAL, ["beta=1"], "unknown-key", "beta", '"method.beta"'),
        (MINIMAL, ["trainable.r=8"], "unknown-key", "trainable.r", '"trainable.lora.r"'),
        (MINIMAL, ["lora_alpha=8"], "unknown-key", "lora_alpha", '"trainable.lora.lora_alpha"'),
        (MINIMAL, ["training.learning_rate=-1"], "invalid-field", "training.learning_rate", "greater than 0"),
        ("method: npo\ndata: d\noutput: o\n", [], "missing-field", "model", "model=..."),
        (MINIMAL, ["beta"], "invalid-override", None, "key=value"),
        (MINIMAL, ["training.seed=[1"], "invalid-override", None, ""),
        ("model: [", [], "invalid-yaml", None, "line 1"),
        ("just text", [], "invalid-yaml", None, ""),
    ],
)
def test_invalid_recipe_names_the_key_and_the_nearest_valid_one(
    tmp_path: Path, text: str, overrides: list[str], code: str, field: str | None, suggestion: str
) -> None:
    file = write(tmp_path, text)
    with raises_code(code, field=field) as caught:
        load(Recipe, file, overrides)
    assert suggestion in str(caught.value)
    assert caught.value.file is None or str(caught.value.file) == str(file)


def test_metric_with_an_unknown_split_suggests_the_nearest() -> None:
    with raises_code("unknown-name") as caught:
        load(Suite, Path("suites/tiny"), ["model=m", "metrics.asr.splits=[unsaf]"])
    assert '"unsaf"; did you mean "unsafe"' in str(caught.value)


def extending(folder: Path, **files: str) -> Path:
    """Writes ``name.yaml`` files and returns the first."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def test_a_recipe_extends_another_and_overrides_come_last(tmp_path: Path) -> None:
    base = "model: m\ndata: d\noutput: o\nmethod: {name: npo, beta: 0.9}\ntraining: {num_train_epochs: 2, seed: 5}\n"
    base += "trainable: {layers: [1, 2]}\n"
    middle = "extends: base.yaml\ntraining: {learning_rate: 1.0e-6}\n"
    top = "extends: middle\nmethod: {paper_compat: true}\ntraining: {seed: 6}\ntrainable: {layers: [3]}\n"
    file = extending(tmp_path, top=top, middle=middle, base=base)
    recipe = load(Recipe, file, ["training.num_train_epochs=3"])
    assert (recipe.method.name, recipe.method.model_extra) == ("npo", {"beta": 0.9, "paper_compat": True})
    assert (recipe.training.num_train_epochs, recipe.training.seed, recipe.training.learning_rate) == (3, 6, 1e-6)
    assert recipe.trainable.layers == [3]


@pytest.mark.parametrize(
    ("below", "above", "options"),
    [
        ("{name: npo, beta: 0.9}", "rmu", {}),
        ("{name: npo, beta: 0.9}", "{name: rmu, layer: 3}", {"layer": 3}),
        ("{name: npo, beta: 0.9}", "npo", {"beta": 0.9}),
        ("npo", "{beta: 0.5}", {"beta": 0.5}),
    ],
)
def test_another_method_drops_the_options_of_the_base(
    tmp_path: Path, below: str, above: str, options: dict[str, object]
) -> None:
    base = f"model: m\ndata: d\noutput: o\nmethod: {below}\n"
    recipe = load(Recipe, extending(tmp_path, top=f"extends: base\nmethod: {above}\n", base=base))
    assert recipe.method.model_extra == options


def test_a_shipped_recipe_or_suite_can_be_extended(tmp_path: Path) -> None:
    recipe = load(
        Recipe, extending(tmp_path, top="extends: tiny/npo\nmodel: m\ndata: d\noutput: o\ntraining: {max_steps: 1}\n")
    )
    assert (recipe.training.max_steps, recipe.training.per_device_train_batch_size) == (1, 16)
    suite = load(Suite, extending(tmp_path, suite="extends: suites/tiny\nmodel: m\njudge: {name: keyword}\n"))
    assert (suite.judge.name, suite.judge.world, len(suite.splits)) == ("keyword", None, 7)
    suite_text = "extends: suites/safety_mirage\nmodel: m\n"
    suite_text += "splits: [{name: unsafe, format: vlguard, file: a, images: b, kind: unsafe}]\n"
    removed = (
        "asr_attacked",
        "asr_control",
        "refusal_rate",
        "refusal_rate_attacked",
        "refusal_rate_control",
        "degenerate_rate",
    )
    metrics = "".join(f"  {name}: null\n" for name in (*removed, "utility", "utility_attacked"))
    published = "".join(
        f"  {name}: null\n" for name in load(Suite, Path("suites/safety_mirage"), ["model=m"]).paper_metrics
    )
    mine = f"{suite_text}metrics:\n{metrics}paper_metrics:\n{published}"
    suite = load(
        Suite, extending(tmp_path, mine=mine), ["paper_compat=false", "judge=keyword", "judge.paper_compat=true"]
    )
    assert list(suite.metrics) == ["asr"]
    assert suite.judge.judge_id == "keyword-paper"


def test_override_sets_list_items_by_name_or_index(tmp_path: Path) -> None:
    suite = load(Suite, Path("suites/specificity"), ["model=m", "benchmarks.vqav2.limit=5", "benchmarks.0.limit=7"])
    assert {benchmark.name: benchmark.limit for benchmark in suite.benchmarks if benchmark.limit} == {
        "vqav2": 5,
        "gqa": 7,
    }
    with raises_code("invalid-override") as caught:
        load(Suite, Path("suites/specificity"), ["model=m", "benchmarks.vqa.limit=5"])
    assert '"vqa"; did you mean "vqav2"' in str(caught.value)


def test_judges_inherit_unset_keys_from_the_suites_judge() -> None:
    settings = [
        "model=m",
        "judge.model=A",
        "judge.server=http://x/v1",
        "judge.max_tokens=9",
        "judge.images=false",
        "judges.safety.model=B",
    ]
    suite = load(Suite, Path("suites/safe_eraser"), settings)
    safety, refusal = suite.judge_config("safety"), suite.judge_config("refusal")
    assert (safety.model, safety.server, safety.max_tokens, safety.images) == ("B", "http://x/v1", 9, False)
    assert (refusal.model, refusal.rubric, refusal.paper_compat) == ("A", "refusal", True)
    with raises_code("secret-in-setting", field="judge"):
        load(Suite, Path("suites/safe_eraser"), ["model=m", "judge.server=http://me:secret@x/v1"])


@pytest.mark.parametrize(
    ("files", "code", "location", "tokens"),
    [
        ({"a": "extends: b\n", "b": "extends: a\n"}, "invalid-field", "b.yaml", ["a.yaml -> ", "b.yaml -> "]),
        ({"a": "extends: a\n"}, "invalid-field", "a.yaml", ["a.yaml -> "]),
        ({"a": "extends: nowhere\n"}, "file-not-found", "nowhere", ["a.yaml extends it"]),
        ({"a": "extends: [b, c]\n"}, "invalid-field", "a.yaml", ["extends"]),
        ({"a": "extends: .\n"}, "invalid-field", "a.yaml", ["extends"]),
        ({"a": "extends: b\n", "b": "model: [\n"}, "invalid-yaml", "b.yaml", ["line 2"]),
        (
            {"a": "extends: b\n" + MINIMAL, "b": "trainning: {}\n"},
            "unknown-key",
            "a.yaml (extends b)",
            ["trainning"],
        ),
    ],
)
def test_invalid_extends_names_the_file(
    tmp_path: Path, files: dict[str, str], code: str, location: str, tokens: list[str]
) -> None:
    with raises_code(code) as caught:
        load(Recipe, extending(tmp_path, **files))
    assert str(caught.value.file).endswith(location)
    assert not [token for token in tokens if token not in str(caught.value)], str(caught.value)


@pytest.mark.parametrize(("config", "name"), [(Suite, "tiny/npo"), (Recipe, "suites/tiny")])
def test_config_of_the_other_kind_is_an_error(config: type[Recipe] | type[Suite], name: str) -> None:
    with raises_code("wrong-config"):
        load(config, Path(name))


def test_paths_of_a_suite_are_relative_to_its_root() -> None:
    suite = load(Suite, Path("suites/tiny"), ["model=m", "root=/world"])
    assert suite.splits[0].file == Path("/world/vlguard/test.json")
    assert suite.judge.world == Path("/world/world.json")
    assert Suite.model_validate(suite.model_dump()) == suite


def test_invalid_value_of_a_union_names_all_types() -> None:
    with raises_code("invalid-field", field="trainable.projector") as caught:
        load(Recipe, Path("tiny/npo"), ["model=m", "data=d", "output=o", "trainable.projector=cosine"])
    assert "boolean" in caught.value.message
    assert "'sine'" in caught.value.message


def test_duplicate_key_of_a_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("method: npo\ntraining: {seed: 1}\nmethod: ga\n")
    with raises_code("invalid-yaml", file=file) as caught:
        load(Recipe, file, ["model=m", "data=d", "output=o"])
    assert "line 3" in str(caught.value)
    assert '"method"' in str(caught.value)


def test_unknown_shipped_name_suggests_the_nearest() -> None:
    with raises_code("file-not-found", file=Path("tiny/npoo")) as caught:
        load(Recipe, Path("tiny/npoo"))
    assert 'did you mean "tiny/npo"?' in str(caught.value)


def test_home_folder_is_expanded() -> None:
    recipe = load(Recipe, Path("tiny/npo"), ["model=m", "data=~/d", "output=~/o"])
    assert recipe.output == Path.home() / "o"
    assert recipe.data == Path.home() / "d"


def descriptions(config: type[BaseModel]) -> dict[str, str | None]:
    """The description of each field of a config and of its nested configs."""
    texts: dict[str, str | None] = {}
    for name, field in config.model_fields.items():
        texts[f"{config.__name__}.{name}"] = field.description
        for inner in nested_configs(field.annotation):
            texts |= descriptions(inner)
    return texts


def test_every_field_has_a_description() -> None:
    configs = [Recipe, Suite, *(method.options_type for method in METHODS.values())]
    texts = {name: text for config in configs for name, text in descriptions(config).items()}
    assert {"LoraConfig.r", "SplitConfig.kind", "NPOOptions.beta", "Bound.at_most"} <= texts.keys()
    assert not [name for name, text in texts.items() if not text or not text.endswith((".", "?"))]
