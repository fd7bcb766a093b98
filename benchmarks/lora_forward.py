"""LoRA layers with the faster forward pass of `modeling/lora_forward.py`, compared with PEFT's.

    OMP_NUM_THREADS=1 python benchmarks/lora_forward.py

Runs a LoRA layer alone, and optimizer steps of a LLaVA with 8 layers of width 256 on 16 questions with an image each,
about 230 tokens a question, with LoRA r 32 on all matrices of the language model. Both sides run in turn in one process
with one thread. Writes the ratios of their CPU times and of the memory that autograd saves for the backward pass to
benchmarks/results/lora_forward.json.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from steps import SIZES, build, make_batch, optimizer, update
from torch import Tensor, nn

from vlm_unlearn.modeling.lora_forward import fast_lora

RESULTS = Path(__file__).parent / "results" / "lora_forward.json"
REPEATS, ROWS, TOKENS, WIDTH = 7, 16, 230, SIZES["15M"].width
WORDS = 400  # a large vocabulary would take most of the time
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def with_lora(model: nn.Module, rate: float, targets: str) -> Any:
    """Returns the model with LoRA layers whose weights are not zero."""
    torch.manual_seed(0)
    lora = LoraConfig(r=32, lora_alpha=64, lora_dropout=rate, target_modules=targets, init_lora_weights=False)
    return get_peft_model(model, lora).train()


def compare(model: nn.Module, run: Callable[[], object]) -> dict[str, float]:
    """Returns the median and range of PEFT's CPU time divided by that of the faster pass."""

    def seconds(fast: bool) -> float:
        with fast_lora(model) if fast else nullcontext():
            started = time.process_time()
            run()
            return time.process_time() - started

    for fast in (False, True):
        seconds(fast)
    pairs = []
    for number in range(REPEATS):
        first = seconds(bool(number % 2))
        second = seconds(not number % 2)
        pairs.append((first, second) if number % 2 else (second, first))
    ratios = [peft / fast for fast, peft in pairs]
    return {"times_faster": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def saved_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Returns the bytes that autograd saves in a forward pass, without those of parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}
    tensors = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            tensors.append(tensor)  # so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(storages.values())


def measure(rate: float) -> dict[str, Any]:
    """Returns the ratios of a layer and of an optimizer step at a rate of dropout."""
    layer = with_lora(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)), rate, "0")
    inputs, gradient = torch.randn(ROWS, TOKENS, WIDTH, requires_grad=True), torch.randn(ROWS, TOKENS, WIDTH)
    row: dict[str, Any] = {"lora_dropout": rate}
    row["layer"] = compare(layer, lambda: [layer(inputs).backward(gradient) for _ in range(10)])
    llava = build(SIZES["15M"], 144)
    llava.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
    model = with_lora(llava, rate, rf".*language_model.*\.({'|'.join(MATRICES)})")
    batch = make_batch(0, ROWS, 1, 144)
    labels = batch["labels"].where(batch["labels"] < 0, batch["labels"] % WORDS)[:, 1:].flatten()
    inputs_of_model = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(**inputs_of_model).logits[:, :-1].flatten(0, 1), labels)

    adam = optimizer(model)
    row["step"] = compare(model, lambda: update(adam, loss()))
    peft = saved_bytes(model, loss)
    with fast_lora(model):
        row["saved_for_backward"] = saved_bytes(model, loss) / peft
    return row


def main() -> None:
    torch.set_num_threads(1)
    rows = [measure(rate) for rate in (0.0, 0.05)]
    for row in rows:
        print(json.dumps(row))
    result = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
