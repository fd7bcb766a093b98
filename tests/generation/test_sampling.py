"""Drawing answers: the distribution is the softmax, and nothing but seed, prompt and sample decides what is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare

from vlm_unlearn.config import GenerationConfig, Suite, load
from vlm_unlearn.generation.base import GenerationRequest, build_requests, sampling_seed
from vlm_unlearn.generation.decoding import SeededSampling, neutral_generation_config
from vlm_unlearn.generation.hf import generate_batch, generate_responses, make_batches
from vlm_unlearn.models.loader import load_model, load_processor
from vlm_unlearn.records import Prompt

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])


def token_counts(count: int, temperature: float = 1.0, top_p: float = 1.0, logits: torch.Tensor = LOGITS) -> list[int]:
    """How often each token is drawn: `count` draws of each of 50 streams."""
    sampling = SeededSampling(range(50), temperature, top_p, torch.device("cpu"))
    scores = logits.repeat(50, 1)
    empty = torch.zeros(50, 1, dtype=torch.long)
    tokens = torch.stack([sampling(empty, scores).argmax(-1) for _ in range(count)])
    return torch.bincount(tokens.flatten(), minlength=len(logits)).tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_draws_are_the_softmax(temperature: float) -> None:
    found = token_counts(400, temperature)
    expected = torch.softmax(LOGITS.double() / temperature, -1) * sum(found)
    assert chisquare(found, expected.tolist()).pvalue > 1e-3


def test_top_p_draws_from_the_likeliest_only() -> None:
    """Probabilities 0.55, 0.20, 0.12, 0.07, 0.03, ...: a share of 0.7 is reached by the second."""
    found = token_counts(400, top_p=0.7)
    likeliest = LOGITS.argsort(descending=True)[:2]
    assert {token for token, count in enumerate(found) if count} == set(likeliest.tolist())
    expected = torch.softmax(LOGITS[likeliest].double(), -1) * sum(found)
    assert chisquare([found[token] for token in likeliest], expected.tolist()).pvalue > 1e-3


def test_what_is_all_but_impossible_is_not_drawn() -> None:
    """Of a real vocabulary's 50,000 tokens one has all of the probability but e-20; coarser noise would draw another now and then."""
    logits = torch.zeros(50_000)
    logits[7] = 31.0
    assert token_counts(40, logits=logits)[7] == 2000


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> tuple[torch.nn.Module, object]:
    return load_model(tiny_model, "fp32").eval(), load_processor(tiny_model)


def prompts(count: int) -> list[Prompt]:
    words = ["what", "colour", "is", "this", "thing", "?"]
    return [
        Prompt(
            id=f"p{number}", group_id="g", set="s", kind="safe", question=" ".join(words[: 2 + number % 5]), image=None
        )
        for number in range(count)
    ]


def texts(
    loaded: tuple[torch.nn.Module, object], asked: list[Prompt], samples: int = 3, **changes: object
) -> dict[tuple[str, int], str]:
    config = GenerationConfig.model_validate({"max_new_tokens": 8, "temperature": 1.0, **changes})
    found = [response for batch in generate_responses(*loaded, asked, {}, config, {"s": samples}) for response in batch]
    return {response.key: str(response.text) for response in found}


def test_neither_batch_nor_order_changes_what_is_drawn(loaded: tuple[torch.nn.Module, object]) -> None:
    whole = texts(loaded, prompts(10))
    assert len(whole) == 30
    for other in (texts(loaded, prompts(10), batch_size=1), texts(loaded, prompts(10)[::-1], batch_size=7)):
        flips = sum(whole[key] != other[key] for key in whole)
        assert flips <= 1  # rounding may differ with the batch; other draws would change nearly all
    assert {key: text for key, text in whole.items() if key[0] == "p3"} == texts(loaded, prompts(10)[3:4], batch_size=1)


def test_seed_sample_and_prompt_change_what_is_drawn(loaded: tuple[torch.nn.Module, object]) -> None:
    whole = texts(loaded, prompts(10))
    assert len(set(whole.values())) > 25
    other = texts(loaded, prompts(10), seed=1)
    assert sum(whole[key] != other[key] for key in whole) > 25


def test_temperature_0_is_greedy(loaded: tuple[torch.nn.Module, object]) -> None:
    one, two = (texts(loaded, prompts(5), 1, temperature=0.0, seed=seed, top_p=0.5) for seed in (1, 2))
    assert one == two
    near = texts(loaded, prompts(5), 1, temperature=1e-4)
    assert near == one


def test_the_models_own_settings_stay_out(loaded: tuple[torch.nn.Module, object]) -> None:
    """A released model's generation_config.json would decode one model in another way than the next."""
    model, processor = loaded
    before = {temperature: texts(loaded, prompts(6), temperature=temperature) for temperature in (0.0, 1.0)}
    own = model.generation_config
    told = {
        "repetition_penalty": 1.8,
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 5,
        "suppress_tokens": list(range(4, 60)),
    }
    try:
        model.generation_config = type(own)(
            **own.to_dict() | told | {"do_sample": True, "temperature": 0.1, "top_k": 1}
        )
        inputs = processor(text="user: what ? assistant:", return_tensors="pt")
        free = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        with neutral_generation_config(model):
            plain = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        assert free.tolist() != plain.tolist()  # they would count
        for temperature, expected in before.items():
            assert texts(loaded, prompts(6), temperature=temperature) == expected
        assert model.generation_config.top_k == 1
    finally:
        model.generation_config = own


def test_an_answer_that_has_ended_disturbs_no_other(loaded: tuple[torch.nn.Module, object]) -> None:
    model, processor = loaded
    config = GenerationConfig(max_new_tokens=40, temperature=1.0)
    questions = build_requests(prompts(8), {}, {"s": 4})
    together = generate_batch(model, processor, questions, config)
    assert {response.finish_reason for response in together} == {"stop", "length"}
    alone = [response for question in questions for response in generate_batch(model, processor, [question], config)]
    assert sum(one.text != other.text for one, other in zip(together, alone, strict=True)) <= 2
    assert [(one.key, one.sample) for one in together] == [(question.key, question.sample) for question in questions]


def test_batches_are_made_of_prompts_and_samples_alone() -> None:
    questions = build_requests(prompts(7), {}, {"s": 2})
    found = make_batches(questions, 4)
    assert sorted(question.key for batch in found for question in batch) == sorted(
        question.key for question in questions
    )
    assert [len(batch) for batch in found] == [4, 4, 4, 2]
    assert make_batches(build_requests(prompts(7), {}, {}), 4) == make_batches(
        build_requests(prompts(7), {}, {"other": 3}), 4
    )


def test_every_answer_has_a_seed_of_its_own() -> None:
    one, two = prompts(2)
    seeds = [
        sampling_seed(seed, GenerationRequest(prompt, sample))
        for seed in (0, 1)
        for prompt in (one, two)
        for sample in (0, 1)
    ]
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sampling_seed(0, GenerationRequest(one, 1)) == sampling_seed(
        0, GenerationRequest(one, 1, Path("elsewhere.png"))
    )


def test_the_suite_in_the_docs_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")
    (tmp_path / "suite.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    suite = load(Suite, tmp_path / "suite.yaml", ["model=m"])
    assert (suite.splits[0].samples, suite.generation.temperature) == (3, 1.0)
