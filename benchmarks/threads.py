"""Times training steps and generation with one and with two CPU threads, by the size of the model.

The threshold `SMALL_MODEL` of `vlm_unlearn.modeling.threads` comes from these figures.

    python benchmarks/threads.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlm_unlearn.modeling.threads import limit_threads

ROWS, TOKENS, NEW_TOKENS, REPEATS = 4, 160, 16, 15
WIDTHS = {  # width, layers, vocabulary
    "tiny world": (128, 3, 300),
    "1M": (96, 6, 2_000),
    "3M": (160, 6, 3_000),
    "5M": (192, 8, 4_000),
    "15M": (256, 8, 16_000),
    "50M": (512, 8, 32_000),
}


def build(width: int, layers: int, vocabulary: int) -> Any:
    """Returns a LLaVA of random weights."""
    torch.manual_seed(0)
    heads = max(2, width // 64)
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        image_size=28,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=int(2.7 * width),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=5, image_seq_length=4)
    return LlavaForConditionalGeneration(config)


def seconds(compute: Callable[[], object]) -> float:
    start = time.perf_counter()
    compute()
    return time.perf_counter() - start


def main() -> None:
    for name, (width, layers, vocabulary) in WIDTHS.items():
        model = build(width, layers, vocabulary)
        parameters = sum(value.numel() for value in model.parameters())
        ids = torch.randint(10, vocabulary, (ROWS, TOKENS))

        def step(model: Any = model, ids: torch.Tensor = ids) -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad()

        def generate(model: Any = model, ids: torch.Tensor = ids) -> None:
            with torch.no_grad():
                model.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)

        for work, compute in (("step", step), ("generation", generate)):
            times: dict[int, list[float]] = {1: [], 2: []}
            for repeat in range(REPEATS + 1):
                for threads in times:
                    with limit_threads(threads):
                        taken = seconds(compute)
                    if repeat:  # the first call warms up
                        times[threads].append(taken)
            best = {threads: min(values) for threads, values in times.items()}
            print(
                f"{name:<11}{parameters / 1e6:6.1f}M {work:<11} 1 thread {best[1] * 1e3:7.1f} ms, "
                f"2 threads {best[2] * 1e3:7.1f} ms: {best[1] / best[2]:.2f} times faster; "
                f"slowest {max(times[1]) * 1e3:.0f} and {max(times[2]) * 1e3:.0f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
