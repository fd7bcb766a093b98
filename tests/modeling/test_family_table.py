"""The table of tested families in docs/extend/family.md: prefix sharing, feature cache and texts without an image."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import families
from vlm_unlearn.data.encoding import Turn, encode_with_labels
from vlm_unlearn.data.processor_call import requires_image
from vlm_unlearn.losses import answer_nll
from vlm_unlearn.modeling.features import cached_vision_features
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.modeling.vlm import VisionLanguageModel

PAGE = Path(__file__).parents[2] / "docs" / "extend" / "family.md"
ROW = re.compile(r"^\| [^|]+ \| `(\w+)` \| (yes|no) \| (yes|no) \| (yes|no) \|$", re.MULTILINE)
DOCUMENTED = dict(zip(families.FAMILIES, ROW.findall(PAGE.read_text(encoding="utf-8")), strict=True))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_documented_abilities_are_those_of_the_family(
    family: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = families.shared_folder(family, tmp_path_factory)
    model, processor = load_model(folder, "fp32").eval().requires_grad_(False), load_processor(folder)
    vlm = VisionLanguageModel(model, processor)
    turns = []
    for number, color in enumerate(("red", "blue", "red")):
        Image.new("RGB", (48, 32), color).save(tmp_path / f"{color}.png")
        turns.append(Turn(str(number), tmp_path / f"{color}.png", "What is it ?", "A cat ."))
    num_runs = 0

    def count(*_: object) -> None:
        nonlocal num_runs
        num_runs += 1

    layers = next(module for module in vlm.vision_tower.modules() if isinstance(module, torch.nn.ModuleList))
    hook = layers[0].register_forward_hook(count)

    def nll() -> torch.Tensor:
        batch = encode_with_labels(processor, turns, 4096)
        labels = batch.pop("labels")
        return answer_nll(model(**batch).logits, labels)[0]

    uncached = nll()
    with cached_vision_features(vlm.vision_tower, 2**28):
        first = nll()
        num_runs = 0
        second = nll()
    hook.remove()
    torch.testing.assert_close(torch.stack([first, second]), torch.stack([uncached] * 2), atol=1e-5, rtol=0)
    abilities = (vlm.supports_prefix_sharing, num_runs == 0, not requires_image(processor))
    assert DOCUMENTED[family] == (vlm.family, *("yes" if ability else "no" for ability in abilities))
