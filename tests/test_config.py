"""Recipes and suites: unknown keys are refused with the nearest right one."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from vlm_unlearn.config import Recipe, Suite, load
from vlm_unlearn.config.base import nested_configs
from vlm_unlearn.errors import UserError
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
    ("text", "overrides", "message"),
    [
        (MINIMAL + "trainning: {}\n", [], r'unknown key "trainning"; did you mean "training"\?'),
        (MINIMAL, ["training.learning_rat=1"], r'unknown key "training\.learning_rat"; did you mean "learning_rate"\?'),
        (MINIMAL, ["trainable.lora.rr=4"], r'unknown key "trainable\.lora\.rr"'),
        (MINIMAL, ["training.lr=1"], r'unknown key "training\.lr"; did you mean "learning_rate"\?'),
        (MINIMAL, ["lr=1"], r'unknown key "lr"; did you mean "training\.learning_rate"\?'),
        (MINIMAL, ["seed=1"], r'unknown key "seed"; did you mean "training\.seed"\?'),
        (MINIMAL, ["beta=1"], r'unknown key "beta"; did you mean "method\.beta"\?'),
        (MINIMAL, ["trainable.r=8"], r'unknown key "trainable\.r"; did you mean "trainable\.lora\.r"\?'),
        (MINIMAL, ["lora_alpha=8"], r'unknown key "lora_alpha"; did you mean "trainable\.lora\.alpha"\?'),
        (MINIMAL, ["training.learning_rate=-1"], r"training\.learning_rate: Input should be greater than 0"),
        ("method: npo\ndata: d\noutput: o\n", [], r'key "model" is missing'),
        (MINIMAL, ["beta"], r"write key=value"),
        ("model: [", [], r"line 1: not valid YAML"),
        ("just text", [], r"expected keys and values"),
    ],
)
def test_wrong_recipes_get_one_clear_line(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(Recipe, write(tmp_path, text), overrides)


def test_a_metric_must_name_a_case() -> None:
    with pytest.raises(UserError, match=r'names the case "unsaf", which is not there; did you mean "unsafe"'):
        load(Suite, Path("suites/tiny"), ["model=m", "metrics.asr.splits=[unsaf]"])


def extending(folder: Path, **files: str) -> Path:
    """Writes ``name.yaml`` files and returns the first."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def test_a_recipe_extends_another_and_overrides_come_last(tmp_path: Path) -> None:
    base = "model: m\ndata: d\noutput: o\nmethod: {name: npo, beta: 0.9}\ntraining: {epochs: 2, seed: 5}\ntrainable: {layers: [1, 2]}\n"
    middle = "extends: base.yaml\ntraining: {learning_rate: 1.0e-6}\n"
    top = "extends: middle\nmethod: {paper: true}\ntraining: {seed: 6}\ntrainable: {layers: [3]}\n"
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
    own = "extends: suites/safety_mirage\nmodel: m\ncases: [{name: unsafe, format: vlguard, file: a, images: b, kind: unsafe}]\n"
    left_out = (
        "asr_attacked",
        "asr_control",
        "refusal_rate",
        "refusal_rate_attacked",
        "refusal_rate_control",
        "degenerate_rate",
    )
    metrics = "".join(f"  {name}: null\n" for name in (*left_out, "utility", "utility_attacked"))
    published = "".join(
        f"  {name}: null\n" for name in load(Suite, Path("suites/safety_mirage"), ["model=m"]).paper_metrics
    )
    mine = f"{own}metrics:\n{metrics}paper_metrics:\n{published}"
    suite = load(
        Suite, extending(tmp_path, mine=mine), ["paper_compat=false", "judge=keyword", "judge.paper_compat=true"]
    )
    assert list(suite.metrics) == ["asr"]
    assert suite.judge.judge_id == "keyword-paper"


def test_items_of_lists_are_set_by_name_or_number(tmp_path: Path) -> None:
    suite = load(Suite, Path("suites/specificity"), ["model=m", "benchmarks.vqav2.limit=5", "benchmarks.0.limit=7"])
    assert {one.name: one.limit for one in suite.benchmarks if one.limit} == {"vqav2": 5, "gqa": 7}
    with pytest.raises(UserError, match='there is no "vqa"; did you mean "vqav2"'):
        load(Suite, Path("suites/specificity"), ["model=m", "benchmarks.vqa.limit=5"])


def test_judges_take_what_they_leave_open_from_the_first() -> None:
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
    assert (refusal.model, refusal.rubric, refusal.paper) == ("A", "refusal", True)
    with pytest.raises(UserError, match="holds no user and password"):
        load(Suite, Path("suites/safe_eraser"), ["model=m", "judge.server=http://me:secret@x/v1"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a": "extends: b\n", "b": "extends: a\n"},
            r"b\.yaml: extends goes in a circle: .*a\.yaml -> .*b\.yaml -> .*a\.yaml",
        ),
        ({"a": "extends: a\n"}, r"extends goes in a circle"),
        ({"a": "extends: nowhere\n"}, r"^nowhere: No such file or directory \(.*a\.yaml extends it\)"),
        ({"a": "extends: [b, c]\n"}, r"a\.yaml: extends: expected one name"),
        ({"a": "extends: .\n"}, r"a\.yaml: extends: expected one name"),
        ({"a": "extends: b\n", "b": "model: [\n"}, r"b\.yaml: line 2: not valid YAML"),
        ({"a": "extends: b\n" + MINIMAL, "b": "trainning: {}\n"}, r'a\.yaml \(extends b\): unknown key "trainning"'),
    ],
)
def test_wrong_extends_get_one_clear_line(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(Recipe, extending(tmp_path, **files))


def test_a_suites_paths_are_below_its_root() -> None:
    suite = load(Suite, Path("suites/tiny"), ["model=m", "root=/world"])
    assert suite.splits[0].file == Path("/world/vlguard/test.json")
    assert suite.judge.world == Path("/world/world.json")
    assert Suite.model_validate(suite.model_dump()) == suite


def test_a_value_of_several_kinds_names_them_all() -> None:
    with pytest.raises(
        UserError, match=r"trainable\.projector: Input should be a valid boolean.* or Input should be 'sine'"
    ):
        load(Recipe, Path("tiny/npo"), ["model=m", "data=d", "output=o", "trainable.projector=cosine"])


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("method: npo\ntraining: {seed: 1}\nmethod: ga\n")
    with pytest.raises(UserError, match='line 3: not valid YAML: the key "method" is there twice'):
        load(Recipe, file, ["model=m", "data=d", "output=o"])


def test_a_misspelt_shipped_recipe_is_named() -> None:
    with pytest.raises(UserError, match=r'tiny/npoo: No such file or directory; did you mean "tiny/npo"\?'):
        load(Recipe, Path("tiny/npoo"))


def test_the_home_folder_is_where_the_shell_says() -> None:
    recipe = load(Recipe, Path("tiny/npo"), ["model=m", "data=~/d", "output=~/o"])
    assert recipe.output == Path.home() / "o"
    assert recipe.data == Path.home() / "d"


def described(config: type[BaseModel]) -> dict[str, str | None]:
    """What each field of a config says of itself, those of configs within it included."""
    found: dict[str, str | None] = {}
    for name, field in config.model_fields.items():
        found[f"{config.__name__}.{name}"] = field.description
        for inner in nested_configs(field.annotation):
            found |= described(inner)
    return found


def test_every_field_says_what_it_is_for() -> None:
    configs = [Recipe, Suite, *(method.options_type for method in METHODS.values())]
    texts = {name: text for config in configs for name, text in described(config).items()}
    assert {"LoraConfig.r", "SplitConfig.kind", "NPOOptions.beta", "Bound.at_most"} <= texts.keys()
    assert not [name for name, text in texts.items() if not text or not text.endswith((".", "?"))]
