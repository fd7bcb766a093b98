"""Sampling: the distribution is the softmax, and nothing but seed, prompt and sample index determines a response."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from vlm_unlearn.config import GenerationConfig, Suite, load
from vlm_unlearn.generation.base import GenerationRequest, build_requests, sampling_seed
from vlm_unlearn.generation.decoding import SeededSampling, neutral_generation_config
from vlm_unlearn.generation.hf import generate_batch, generate_responses, make_batches
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.records import Prompt

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])


def token_counts(count: int, temperature: float = 1.0, top_p: float = 1.0, logits: torch.Tensor = LOGITS) -> list[int]:
    """Returns how often each token is sampled in `count` steps of 50 streams."""
    sampling = SeededSampling(range(50), temperature, top_p, torch.device("cpu"))
    scores = logits.repeat(50, 1)
    empty = torch.zeros(50, 1, dtype=torch.long)
    tokens = torch.stack([sampling(empty, scores).argmax(-1) for _ in range(count)])
    return torch.bincount(tokens.flatten(), minlength=len(logits)).tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_samples_follow_the_softmax(temperature: float) -> None:
    counts = token_counts(400, temperature)
    expected = torch.softmax(LOGITS.double() / temperature, -1) * sum(counts)
    assert chisquare(counts, expected.tolist()).pvalue > 1e-3


def test_top_p_samples_most_likely_tokens_only() -> None:
    """The probabilities are 0.55, 0.20, 0.12, 0.07 and 0.03. The first two add up to more than 0.7."""
    counts = token_counts(400, top_p=0.7)
    most_likely = LOGITS.argsort(descending=True)[:2]
    assert {token for token, count in enumerate(counts) if count} == set(most_likely.tolist())
    expected = torch.softmax(LOGITS[most_likely].double(), -1) * sum(counts)
    assert chisquare([counts[token] for token in most_likely], expected.tolist()).pvalue > 1e-3


@pytest.mark.slow
def test_nearly_impossible_tokens_are_never_sampled() -> None:
    """One of 50,000 tokens has all probability but e^-20. Uniform noise of 24 bits would sometimes sample another one:
    about six times in these 2,000 samples."""
    logits = torch.zeros(50_000)
    logits[7] = 31.0
    assert token_counts(40, logits=logits)[7] == 2000


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    return load_model(tiny_model, "fp32").eval(), load_processor(tiny_model)


def prompts(count: int) -> list[Prompt]:
    words = ["what", "color", "is", "this", "thing", "?"]
    return [
        Prompt(
            id=f"p{number}", group_id="g", set="s", kind="safe", question=" ".join(words[: 2 + number % 5]), image=None
        )
        for number in range(count)
    ]


def sample_texts(
    loaded: tuple[Any, Any], prompts: list[Prompt], samples: int = 3, **changes: object
) -> dict[tuple[str, int], str]:
    config = GenerationConfig.model_validate({"max_new_tokens": 8, "temperature": 1.0, **changes})
    batches = generate_responses(*loaded, prompts, {}, config, {"s": samples})
    return {response.key: str(response.text) for batch in batches for response in batch}


def test_samples_do_not_depend_on_batch_and_order(loaded: tuple[Any, Any]) -> None:
    texts = sample_texts(loaded, prompts(6))
    assert len(texts) == 18
    single = sample_texts(loaded, prompts(6), batch_size=1)
    for others in (single, sample_texts(loaded, prompts(6)[::-1], batch_size=7)):
        # Rounding may differ between batches. Different random streams would change nearly all texts.
        assert sum(texts[key] != others[key] for key in texts) <= 1
    assert {key: text for key, text in single.items() if key[0] == "p3"} == sample_texts(
        loaded, prompts(6)[3:4], batch_size=1
    )


def test_samples_depend_on_seed_sample_and_prompt(loaded: tuple[Any, Any]) -> None:
    texts = sample_texts(loaded, prompts(10))
    assert len(set(texts.values())) > 25
    other_seed = sample_texts(loaded, prompts(10), seed=1)
    assert sum(texts[key] != other_seed[key] for key in texts) > 25


def test_temperature_0_is_greedy(loaded: tuple[Any, Any]) -> None:
    greedy, other_seed = (sample_texts(loaded, prompts(5), 1, temperature=0.0, seed=seed, top_p=0.5) for seed in (1, 2))
    assert greedy == other_seed
    assert sample_texts(loaded, prompts(5), 1, temperature=1e-4) == greedy


def test_generation_config_of_model_is_ignored(loaded: tuple[Any, Any]) -> None:
    """The generation_config.json of released models would make decoding differ between models."""
    model, processor = loaded
    expected = {temperature: sample_texts(loaded, prompts(6), temperature=temperature) for temperature in (0.0, 1.0)}
    original = model.generation_config
    settings = {
        "repetition_penalty": 1.8,
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 5,
        "suppress_tokens": list(range(4, 60)),
        "do_sample": True,
        "temperature": 0.1,
        "top_k": 1,
    }
    try:
        model.generation_config = type(original)(**original.to_dict() | settings)
        inputs = processor(text="user: what ? assistant:", return_tensors="pt")
        with_settings = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        with neutral_generation_config(model):
            neutral = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        assert with_settings.tolist() != neutral.tolist()  # the settings have an effect
        for temperature, texts in expected.items():
            assert sample_texts(loaded, prompts(6), temperature=temperature) == texts
        assert model.generation_config.top_k == 1
    finally:
        model.generation_config = original


@pytest.mark.slow
def test_rows_that_have_ended_do_not_change_other_rows(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    config = GenerationConfig(max_new_tokens=40, temperature=1.0)
    requests = build_requests(prompts(8), {}, {"s": 2})
    batch = generate_batch(model, processor, requests, config)
    assert {response.finish_reason for response in batch} == {"stop", "length"}
    single = [response for request in requests for response in generate_batch(model, processor, [request], config)]
    assert sum(a.text != b.text for a, b in zip(batch, single, strict=True)) <= 1
    assert [response.key for response in batch] == [request.key for request in requests]


def test_make_batches_depends_on_prompts_and_samples_only() -> None:
    requests = build_requests(prompts(7), {}, {"s": 2})
    batches = make_batches(requests, 4)
    assert sorted(request.key for batch in batches for request in batch) == sorted(r.key for r in requests)
    assert [len(batch) for batch in batches] == [4, 4, 4, 2]
    without_samples = make_batches(build_requests(prompts(7), {}, {}), 4)
    assert without_samples == make_batches(build_requests(prompts(7), {}, {"other": 3}), 4)


def test_sampling_seed_depends_on_seed_prompt_and_sample_only() -> None:
    first, second = prompts(2)
    seeds = [
        sampling_seed(seed, GenerationRequest(prompt, sample))
        for seed in (0, 1)
        for prompt in (first, second)
        for sample in (0, 1)
    ]
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)
    with_image = GenerationRequest(first, 1, Path("elsewhere.png"))
    assert sampling_seed(0, GenerationRequest(first, 1)) == sampling_seed(0, with_image)


def test_suite_of_the_generation_page_is_valid(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")
    (tmp_path / "suite.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    suite = load(Suite, tmp_path / "suite.yaml", ["model=m"])
    assert (suite.splits[0].samples, suite.generation.temperature) == (3, 1.0)
