"""Answering together against answering one by one. Two parts, both or the one that is named:

    python benchmarks/generation.py [batching] [k-shot]

batching: the demo's base model (trained once, about 40 s, and cached) on 200 prompts of the tiny world, in batches of several sizes.
k-shot: a LLaVA of 53M random weights on 3 rewrites of a question with 3 samples each, all on one image of 144 tokens.

The ways take turns, several times, the model loaded and warm. Writes the part of benchmarks/results/generation.json: seconds, the
median of the ratios, and how many answers differ.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "generation.json"
PROMPTS = 200
REWRITES = SAMPLES = 3
IMAGE_TOKENS, NEW_TOKENS = 144, 64


def batching(repetitions: int) -> dict[str, Any]:
    """Batches of the tiny world's prompts."""
    from vlm_unlearn.config import GenerationConfig, Suite, load
    from vlm_unlearn.evaluation.prompts import image_roots, suite_prompts
    from vlm_unlearn.generation.base import evenly_spaced
    from vlm_unlearn.generation.hf import generate_responses
    from vlm_unlearn.models.loader import load_model, load_processor
    from vlm_unlearn.tiny_world.base_model import BaseConfig, base_model
    from vlm_unlearn.tiny_world.world import write_world

    base = base_model(BaseConfig())
    model, processor = load_model(base, "fp32").eval(), load_processor(base)
    with tempfile.TemporaryDirectory() as scratch:
        world = Path(scratch) / "world"
        write_world(world, 0)
        suite = load(Suite, Path("suites/tiny"), [f"model={base}", f"root={world}"])
        prompts = evenly_spaced(suite_prompts(suite), PROMPTS)

        def answered(batch_size: int) -> tuple[float, dict[str, str | None]]:
            config = suite.generation.model_copy(update={"batch_size": batch_size})
            started = time.perf_counter()
            batches = list(generate_responses(model, processor, prompts, image_roots(suite), config))
            return time.perf_counter() - started, {
                response.prompt_id: response.text for batch in batches for response in batch
            }

        sizes = [suite.generation.batch_size, GenerationConfig().batch_size, 1]  # the demo's, the default, one by one
        answered(sizes[0])  # warm
        rows = []
        flips = dict.fromkeys(sizes[:-1], 0)
        for number in range(repetitions):
            found = {
                size: answered(size) for size in (sizes if number % 2 else sizes[::-1])
            }  # neither always goes first
            for size in flips:
                flips[size] = max(flips[size], sum(found[size][1][id] != text for id, text in found[1][1].items()))
            rows.append({f"batches_of_{size}_s": round(found[size][0], 3) for size in sizes})
            print(rows[-1], flush=True)
    ratios = {
        size: statistics.median(row["batches_of_1_s"] / row[f"batches_of_{size}_s"] for row in rows) for size in flips
    }
    return {
        "prompts": len(prompts),
        "max_new_tokens": suite.generation.max_new_tokens,
        "times_faster_than_one_by_one": {size: round(ratio, 1) for size, ratio in ratios.items()},
        "answers_that_differ": flips,
        "rows": rows,
    }


def k_shot(repetitions: int) -> dict[str, Any]:
    """Rewrites and samples on one image: as the library answers them, and each alone with its image by `generate`."""
    import torch
    from steps import SIZES, build
    from transformers import LogitsProcessorList

    from vlm_unlearn.data.encoding import Turn, encode
    from vlm_unlearn.generation.decoding import SeededSampling, neutral_generation_config
    from vlm_unlearn.generation.hf import generate_texts

    model, processor = build(SIZES["53M"], IMAGE_TOKENS).eval(), word_processor()
    model.generation_config.eos_token_id = None  # every answer has its full length
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch) / "noise.png"
        draw(image)
        texts = [
            " ".join(f"w{100 * rewrite + word}" for word in range(12 + 6 * rewrite))
            for rewrite in range(1, REWRITES + 1)
        ]
        turns = [Turn(f"{text[:4]}-{sample}", image, text, None) for text in texts for sample in range(SAMPLES)]

        def drawing(seeds: range, temperature: float) -> SeededSampling | None:
            return SeededSampling(seeds, temperature, 1.0, model.device) if temperature else None

        def together(temperature: float) -> list[str]:
            return [
                text
                for text, _ in generate_texts(
                    model, processor, turns, NEW_TOKENS, drawing(range(len(turns)), temperature)
                )
            ]

        @torch.no_grad()
        def verify_batching(temperature: float) -> list[str]:
            found = []
            for number, turn in enumerate(turns):
                inputs, drawn = (
                    encode(processor, [turn], padding_side="left"),
                    drawing(range(number, number + 1), temperature),
                )
                with neutral_generation_config(model):
                    processors = LogitsProcessorList([drawn] if drawn else [])
                    output = model.generate(
                        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, logits_processor=processors
                    )
                found += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            return found

        found = {
            name: in_turn(together, verify_batching, value, repetitions)
            for name, value in (("greedy", 0.0), ("temperature_1", 1.0))
        }
    return {"rewrites": REWRITES, "samples": SAMPLES, "image_tokens": IMAGE_TOKENS, "new_tokens": NEW_TOKENS, **found}


def in_turn(
    together: Callable[[float], list[str]],
    verify_batching: Callable[[float], list[str]],
    temperature: float,
    repetitions: int,
) -> dict[str, Any]:
    """Times both ways in turn."""

    def timed(answer: Callable[[float], list[str]]) -> tuple[float, list[str]]:
        started = time.perf_counter()
        said = answer(temperature)
        return time.perf_counter() - started, said

    timed(together)  # warm
    rows, differ, texts = [], 0, 0
    for number in range(repetitions):
        order = [together, verify_batching] if number % 2 else [verify_batching, together]  # neither always goes first
        found = {answer: timed(answer) for answer in order}
        (ours, here), (theirs, there) = found[together], found[verify_batching]
        differ, texts = max(differ, sum(a != b for a, b in zip(here, there, strict=True))), len(set(there))
        rows.append({"together_s": round(ours, 3), "one_by_one_s": round(theirs, 3)})
        print(temperature, rows[-1], flush=True)
    ratio = statistics.median(row["one_by_one_s"] / row["together_s"] for row in rows)
    return {
        "times_faster_than_one_by_one": round(ratio, 1),
        "answers_that_differ": differ,
        "different_texts": texts,
        "rows": rows,
    }


def word_processor() -> Any:
    """A processor for the models of steps.py: a word a token, a system line of 35 before the image."""
    from steps import IMAGE_TOKEN, PATCH, VOCABULARY
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(VOCABULARY)}
    words = {word: number for word, number in words.items() if number not in (0, IMAGE_TOKEN)} | {
        "<pad>": 0,
        "<image>": IMAGE_TOKEN,
    }
    backend = Tokenizer(WordLevel(words, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
    side = PATCH * round(IMAGE_TOKENS**0.5)
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=" ".join(f"w{number}" for number in range(10, 45))
        + " <image> {{ messages[0]['content'][-1]['text'] }} w9",
    )


def draw(image: Path) -> None:
    """Noise, of a photograph's size."""
    import torch
    from PIL import Image

    pixels = torch.randint(256, (480 * 640 * 3,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.frombytes("RGB", (640, 480), pixels.numpy().tobytes()).save(image)


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {"batching": batching, "k-shot": k_shot}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=" or ".join(PARTS))
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")

    import torch

    from vlm_unlearn.store import package_versions

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.parts or PARTS:
        results[name] = PARTS[name](options.repetitions) | {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU used",
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "versions": package_versions(),
        }
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        print({key: value for key, value in results[name].items() if key not in ("rows", "versions")})
    print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
