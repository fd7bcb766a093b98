"""Runs the model class `llava_hf` of lmms-eval for generation.py, in the Python environment of lmms-eval.

    PYTHON benchmarks/lmms_eval_worker.py MODEL PROMPTS.json

PROMPTS.json contains the image, the question, and the maximum number of tokens of each prompt. For each line of the
input, the worker answers all prompts, and prints the seconds of CPU time and the answers as JSON. The images are opened
in the measured time, as lmms-eval opens those of its tasks.
"""

from __future__ import annotations

import json
import sys
import time
import types
from pathlib import Path
from typing import Any


def main() -> None:
    sys.modules.setdefault("decord", types.ModuleType("decord"))  # reads videos, and has no wheel for every Python
    sys.modules["decord"].__dict__.update(VideoReader=None, cpu=None)
    import torch
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.simple.llava_hf import LlavaHf
    from loguru import logger
    from PIL import Image

    logger.remove()
    torch.set_num_threads(1)
    prompts = json.loads(Path(sys.argv[2]).read_text())
    model: Any = LlavaHf(pretrained=sys.argv[1], device="cpu", device_map="cpu", dtype="float32", batch_size=1)
    model.task_dict = {"task": {"test": prompts}}

    def images_of(prompt: dict[str, Any]) -> list[Any]:
        with Image.open(prompt["image"]) as image:
            return [image.convert("RGB")]

    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        requests = []
        for number, prompt in enumerate(prompts):
            settings = {"max_new_tokens": prompt["max_new_tokens"], "temperature": 0}
            arguments = (prompt["question"], settings, images_of, number, "task", "test")
            metadata = {"task": "task", "doc_id": number, "repeats": 1}
            requests.append(Instance("generate_until", arguments, idx=0, metadata=metadata))
        started = time.process_time()
        answers = model.generate_until(requests)
        print(json.dumps({"seconds": time.process_time() - started, "answers": answers}), flush=True)


if __name__ == "__main__":
    main()
