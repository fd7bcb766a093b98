"""Generation compared with one answer at a time and with other implementations, in three benchmarks:

    OMP_NUM_THREADS=1 python benchmarks/generation.py [batching] [k-shot] [others] [--lmms-eval-python PYTHON]

batching: the demo's base model (trained once in about 40 s and cached) on 200 prompts of the tiny world, in several
    batch sizes.
k-shot: a LLaVA with 53M random weights on 3 rewrites of a question with 3 samples each, all on one image of 144 tokens.
others: a LLaVA with 10M random weights on 100 prompts with answers of 1 to 64 tokens, against a loop over batches with
    `generate` of transformers. With --lmms-eval-python also against the class `llava_hf` of lmms-eval, which accepts
    a batch size of 1 only. PYTHON is the interpreter of an environment with lmms-eval 0.7.3 and the same versions of
    torch and transformers.

The variants run in turn, several times, with a loaded and warm model. Each benchmark writes its section of
benchmarks/results/generation.json: seconds, the median of the ratios, and the number of different answers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "generation.json"
PROMPTS = 200
REWRITES = SAMPLES = 3
IMAGE_TOKENS, NEW_TOKENS = 144, 64
BATCH_SIZE = 8
WEIGHT_SCALE, EOS_SCALE = 6, 3.2  # with larger random weights, answers do not repeat one token, and end at some time
WORKLOADS = [(144, 4), (144, 1)]  # image tokens, questions per image
OTHERS_PROMPTS = 100


def batching(repetitions: int) -> dict[str, Any]:
    """Compares batch sizes on prompts of the tiny world."""
    from vlm_unlearn.config import GenerationConfig, Suite, load
    from vlm_unlearn.evaluation.prompts import image_roots, suite_prompts
    from vlm_unlearn.generation.base import evenly_spaced
    from vlm_unlearn.generation.hf import generate_responses
    from vlm_unlearn.modeling.loader import load_model, load_processor
    from vlm_unlearn.worlds.tiny.base_model import BaseConfig, base_model
    from vlm_unlearn.worlds.tiny.world import write_world

    base = base_model(BaseConfig())
    model, processor = load_model(base, "fp32").eval(), load_processor(base)
    with tempfile.TemporaryDirectory() as scratch:
        world = Path(scratch) / "world"
        write_world(world, 0)
        suite = load(Suite, Path("suites/tiny"), [f"model={base}", f"root={world}"])
        prompts = evenly_spaced(suite_prompts(suite), PROMPTS)

        def generate(batch_size: int) -> tuple[float, dict[str, str | None]]:
            config = suite.generation.model_copy(update={"batch_size": batch_size})
            started = time.perf_counter()
            batches = list(generate_responses(model, processor, prompts, image_roots(suite), config))
            return time.perf_counter() - started, {
                response.prompt_id: response.text for batch in batches for response in batch
            }

        sizes = [
            suite.generation.batch_size,
            GenerationConfig().batch_size,
            1,
        ]  # of the demo, the default, one at a time
        generate(sizes[0])  # warm-up
        rows = []
        flips = dict.fromkeys(sizes[:-1], 0)
        for number in range(repetitions):
            order = sizes if number % 2 else sizes[::-1]  # so that no size always runs first
            results = {size: generate(size) for size in order}
            for size in flips:
                flips[size] = max(flips[size], sum(results[size][1][id] != text for id, text in results[1][1].items()))
            rows.append({f"batches_of_{size}_s": round(results[size][0], 3) for size in sizes})
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
    """Runs `compare_k_shot` for a small model."""
    from steps import SIZES, build

    return compare_k_shot(build(SIZES["53M"], IMAGE_TOKENS).eval(), IMAGE_TOKENS, repetitions)


def compare_k_shot(
    model: Any, image_tokens: int, repetitions: int, temperatures: Sequence[float] = (0.0, 1.0)
) -> dict[str, Any]:
    """Compares this package with `generate` for one answer at a time, on rewrites and samples of one image."""
    import torch
    from transformers import LogitsProcessorList

    from vlm_unlearn.data.encoding import Turn, encode, move
    from vlm_unlearn.generation.decoding import SeededSampling, neutral_generation_config
    from vlm_unlearn.generation.hf import generate_texts

    processor = word_processor(image_tokens)
    model.generation_config.eos_token_id = None  # every answer has its full length
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch) / "noise.png"
        draw(image)
        texts = [
            " ".join(f"w{100 * rewrite + word}" for word in range(12 + 6 * rewrite))
            for rewrite in range(1, REWRITES + 1)
        ]
        turns = [Turn(f"{text[:4]}-{sample}", image, text, None) for text in texts for sample in range(SAMPLES)]

        def sampling(seeds: range, temperature: float) -> SeededSampling | None:
            return SeededSampling(seeds, temperature, 1.0, model.device) if temperature else None

        def together(temperature: float) -> list[str]:
            return [
                text
                for text, _ in generate_texts(
                    model, processor, turns, NEW_TOKENS, sampling(range(len(turns)), temperature)
                )
            ]

        @torch.no_grad()
        def one_by_one(temperature: float) -> list[str]:
            texts = []
            for number, turn in enumerate(turns):
                inputs = move(encode(processor, [turn], padding_side="left"), model.device, model.dtype)
                sampler = sampling(range(number, number + 1), temperature)
                with neutral_generation_config(model):
                    processors = LogitsProcessorList([sampler] if sampler else [])
                    output = model.generate(
                        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, logits_processor=processors
                    )
                texts += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            return texts

        results = {
            f"temperature_{value:g}" if value else "greedy": compare_in_turn(together, one_by_one, value, repetitions)
            for value in temperatures
        }
    return {"rewrites": REWRITES, "samples": SAMPLES, "image_tokens": image_tokens, "new_tokens": NEW_TOKENS, **results}


def compare_in_turn(
    together: Callable[[float], list[str]],
    one_by_one: Callable[[float], list[str]],
    temperature: float,
    repetitions: int,
) -> dict[str, Any]:
    """Times both variants in turn."""

    def timed(answer: Callable[[float], list[str]]) -> tuple[float, list[str]]:
        started = time.perf_counter()
        texts = answer(temperature)
        return time.perf_counter() - started, texts

    timed(together)  # warm-up
    rows, differ, texts = [], 0, 0
    for number in range(repetitions):
        order = [together, one_by_one] if number % 2 else [one_by_one, together]  # so that neither always runs first
        results = {answer: timed(answer) for answer in order}
        (ours, our_texts), (theirs, single_texts) = results[together], results[one_by_one]
        differ, texts = (
            max(differ, sum(a != b for a, b in zip(our_texts, single_texts, strict=True))),
            len(set(single_texts)),
        )
        rows.append({"together_s": round(ours, 3), "one_by_one_s": round(theirs, 3)})
        print(temperature, rows[-1], flush=True)
    ratio = statistics.median(row["one_by_one_s"] / row["together_s"] for row in rows)
    return {
        "times_faster_than_one_by_one": round(ratio, 1),
        "answers_that_differ": differ,
        "different_texts": texts,
        "rows": rows,
    }


def others(repetitions: int, lmms_eval_python: str | None = None) -> dict[str, Any]:
    """Compares this package with `generate` of transformers in batches, and with lmms-eval."""
    return {
        f"{image_tokens}_image_tokens_{questions}_questions_an_image": compare_implementations(
            image_tokens, questions, repetitions, lmms_eval_python
        )
        for image_tokens, questions in WORKLOADS
    }


def compare_implementations(
    image_tokens: int, questions: int, repetitions: int, lmms_eval_python: str | None
) -> dict[str, Any]:
    """Runs all implementations in turn on the same prompts, and compares their answers."""
    from steps import Size, build

    from vlm_unlearn.config import GenerationConfig
    from vlm_unlearn.generation.hf import generate_responses
    from vlm_unlearn.records import Prompt

    processor = word_processor(image_tokens)
    model = build(Size(width=128, layers=6, vision_width=128, vision_layers=4), image_tokens).eval()
    for parameter in model.model.language_model.parameters():
        parameter.data *= WEIGHT_SCALE if parameter.dim() == 2 else 1
    model.lm_head.weight.data[processor.tokenizer.eos_token_id] *= EOS_SCALE
    for name in ("eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(processor.tokenizer, name))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        prompts = []
        for number in range(OTHERS_PROMPTS):
            image = folder / f"{number // questions}.png"
            if not image.exists():
                draw(image, number)
            words = " ".join(f"w{100 + (37 * number + 11 * word) % 20_000}" for word in range(8 + number % 17))
            prompts.append(
                Prompt(id=str(number), group_id=str(number), set="s", kind="safe", question=words, image=image.name)
            )
        config = GenerationConfig(max_new_tokens=NEW_TOKENS, batch_size=BATCH_SIZE)

        def ours(batch_size: int) -> list[str]:
            settings = config.model_copy(update={"batch_size": batch_size})
            batches = generate_responses(model, processor, prompts, {"s": folder}, settings)
            texts = {response.prompt_id: response.text or "" for batch in batches for response in batch}
            return [texts[prompt.id] for prompt in prompts]

        def transformers(batch_size: int) -> list[str]:
            return plain_answers(model, processor, prompts, folder, batch_size)

        variants: dict[str, Callable[[], tuple[list[str], float | None]]] = {
            "ours": lambda: (ours(BATCH_SIZE), None),
            "transformers": lambda: (transformers(BATCH_SIZE), None),
        }
        worker = None
        if lmms_eval_python is not None:
            worker = LmmsEval(lmms_eval_python, folder, prompts)
            variants["lmms_eval"] = worker.answers
        try:
            return time_in_turn(variants, repetitions) | {
                "answers_of_ours_one_by_one_that_differ": count_differences(ours(1), transformers(1)),
                "prompts": OTHERS_PROMPTS,
                "batch_size": BATCH_SIZE,
                "max_new_tokens": NEW_TOKENS,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
            }
        finally:
            if worker is not None:
                worker.close()


def plain_answers(model: Any, processor: Any, prompts: Sequence[Any], folder: Path, batch_size: int) -> list[str]:
    """Returns the greedy answers of `generate` in consecutive batches, padded on the left."""
    import torch
    from PIL import Image

    answers = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        conversations = [[{"role": "user", "content": [{"type": "text", "text": p.question}]}] for p in batch]
        texts = [processor.apply_chat_template(conversation, tokenize=False) for conversation in conversations]
        images = [Image.open(folder / prompt.image).convert("RGB") for prompt in batch]
        inputs = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


class LmmsEval:
    """A process with lmms-eval's `llava_hf`, which answers the prompts on request."""

    def __init__(self, python: str, folder: Path, prompts: Sequence[Any]) -> None:
        file = folder / "prompts.json"
        file.write_text(
            json.dumps(
                [
                    {"image": str(folder / p.image), "question": p.question, "max_new_tokens": NEW_TOKENS}
                    for p in prompts
                ]
            )
        )
        script = Path(__file__).parent / "lmms_eval_worker.py"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [python, str(script), str(folder / "model"), str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._read()

    def answers(self) -> tuple[list[str], float]:
        """Answers all prompts. Returns the answers and the seconds of CPU time."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        result = self._read()
        assert isinstance(result, dict)
        return result["answers"], result["seconds"]

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> Any:
        """Returns the next JSON document of the process. Other lines are progress."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                return json.loads(line)
            except ValueError:
                continue
        raise SystemExit("lmms-eval could not be started. Run lmms_eval_worker.py by hand to see the reason.")


def time_in_turn(variants: dict[str, Callable[[], tuple[list[str], float | None]]], repetitions: int) -> dict[str, Any]:
    """Measures the variants in turn, in seconds of CPU time, which other processes hardly change.

    Ratios are relative to the first variant.
    """
    first, *rest = variants
    rows, answers = [], {}
    for number in range(repetitions):
        row = {}
        for name in list(variants) if number % 2 else list(variants)[::-1]:  # so that none always runs first
            started = time.process_time()
            answers[name], seconds = variants[name]()
            row[f"{name}_s"] = round(time.process_time() - started if seconds is None else seconds, 3)
        rows.append(row)
        print(row, flush=True)
    lengths = [len(text.split()) for text in answers[first]]
    result: dict[str, Any] = {
        "answer_tokens_mean_and_maximum": [round(statistics.mean(lengths), 1), max(lengths)],
        "different_answers": len(set(answers[first])),
    }
    for name in rest:
        ratios = [row[f"{name}_s"] / row[f"{first}_s"] for row in rows]
        result[f"times_faster_than_{name}"] = [round(f(ratios), 2) for f in (statistics.median, min, max)]
        result[f"answers_that_differ_from_{name}"] = count_differences(answers[first], answers[name])
    return result | {"rows": rows}


def count_differences(first: Sequence[str], second: Sequence[str]) -> int:
    """Returns the number of different answers."""
    return sum(a.strip() != b.strip() for a, b in zip(first, second, strict=True))


def word_processor(image_tokens: int) -> Any:
    """Returns a processor for the models of steps.py: one token per word, and a system prompt of 35 tokens."""
    from steps import IMAGE_TOKEN, PATCH, VOCABULARY
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(VOCABULARY)}
    words = {word: number for word, number in words.items() if number not in (0, IMAGE_TOKEN, VOCABULARY - 1)} | {
        "<pad>": 0,
        "<image>": IMAGE_TOKEN,
        "</s>": VOCABULARY - 1,
    }
    backend = Tokenizer(WordLevel(words, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", extra_special_tokens={"image_token": "<image>"}
    )
    side = PATCH * round(image_tokens**0.5)
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        # lmms-eval's messages are strings, which contain the image.
        chat_template=" ".join(f"w{number}" for number in range(10, 45))
        + "{% set content = messages[0]['content'] %}"
        + " {{ content if content is string else '<image> ' + content[-1]['text'] }} w9",
    )


def draw(image: Path, seed: int = 0) -> None:
    """Writes noise of the size of a photograph."""
    import torch
    from PIL import Image

    pixels = torch.randint(256, (480 * 640 * 3,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    Image.frombytes("RGB", (640, 480), pixels.numpy().tobytes()).save(image)


BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {"batching": batching, "k-shot": k_shot, "others": others}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="*", metavar="benchmark", help=" or ".join(BENCHMARKS))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--lmms-eval-python", metavar="PYTHON", help="compares `others` with lmms-eval too")
    options = parser.parse_args()
    if unknown := set(options.benchmarks) - set(BENCHMARKS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}. Benchmarks: {', '.join(BENCHMARKS)}")

    import torch

    from vlm_unlearn.store import package_versions

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.benchmarks or BENCHMARKS:
        arguments = {"lmms_eval_python": options.lmms_eval_python} if name == "others" else {}
        results[name] = BENCHMARKS[name](options.repetitions, **arguments) | {
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
