"""Peak memory of LoRA training by method, compared with a second model as the reference, as in the published code.

    python benchmarks/training_memory.py

Builds a LLaVA with 110 million random weights (440 MB in float32), trains a few steps of each method in a separate
process, and writes benchmarks/results/training_memory.json. `second model` is the same npo run next to a frozen
copy of the model.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "training_memory.json"
METHODS = ("ga", "gd", "po", "npo", "dpo", "kl", "rmu", "rr", "undial")


def build(folder: Path) -> None:
    """Writes the model and a training set of the tiny world."""
    import torch

    from vlm_unlearn.data_tools.importers import import_vlguard
    from vlm_unlearn.worlds.tiny.lexicon import vocabulary
    from vlm_unlearn.worlds.tiny.llava import tiny_llava, tiny_processor
    from vlm_unlearn.worlds.tiny.world import WorldSize, write_world

    write_world(
        folder / "world", 0, WorldSize(train_images=1, test_images=1, general_images=1, train_records=1, val_records=1)
    )
    vlguard = folder / "world" / "vlguard"
    import_vlguard(vlguard / "train.json", vlguard / "train", folder / "data", vlguard / "harmful_answers.json")
    processor = tiny_processor(vocabulary())
    torch.manual_seed(0)
    tiny_llava(processor, width=1024, vision_layers=2, layers=10).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")


def train(folder: Path, method: str, second: bool) -> None:
    """Trains in this process and prints the peak memory before and after, in MiB."""
    import torch

    from vlm_unlearn.config import Recipe
    from vlm_unlearn.modeling.loader import load_model
    from vlm_unlearn.store import peak_memory_mb
    from vlm_unlearn.training.runner import run_recipe

    torch.set_num_threads(2)
    options = {"rmu": {"layer": 3}, "rr": {"layers": [3, 6]}}.get(method, {})
    recipe = {
        "model": str(folder / "model"),
        "data": str(folder / "data"),
        "output": tempfile.mkdtemp(dir=folder),
        "method": {"name": method, **options},
        "trainable": {"mode": "lora", "projector": True, "lora": {"r": 8}},
        "training": {"max_steps": 3, "per_device_train_batch_size": 2, "precision": "fp32", "learning_rate": 1e-4},
    }
    start_peak = peak_memory_mb()
    # A deep copy: on a CPU, unlike on a GPU, models loaded from the same file share its memory pages.
    second_model = copy.deepcopy(load_model(folder / "model", "fp32")) if second else None
    run_recipe(Recipe.model_validate(recipe))
    del second_model
    print(json.dumps({"peak_mb": peak_memory_mb(), "before_mb": start_peak}))


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        subprocess.run([sys.executable, __file__, "build", str(folder)], check=True)
        weights = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors")) / 2**20
        for method, second in [*((method, False) for method in METHODS), ("npo", True)]:
            command = [sys.executable, __file__, "train", str(folder), method, str(int(second))]
            environment = {"VLM_UNLEARN_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, env={**os.environ, **environment}
            )
            printed = json.loads(done.stdout.splitlines()[-1])
            used = printed["peak_mb"] - printed["before_mb"]
            rows.append({"method": method, "second_model": second, "peak_mb": used, "models": round(used / weights, 2)})
            name = method + (" + second model" if second else "")
            print(f"{name:<20}{used:>7} MB above start, {used / weights:.2f} x the weights")
    machine = {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"weights_mb": round(weights), "machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["build"]:
        build(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["train"]:
        train(Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "1")
    else:
        main()
