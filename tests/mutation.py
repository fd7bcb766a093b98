"""Breaks chosen lines one at a time and checks that the tests fail: ``make mutation`` (about ten minutes).

Each mutation is applied to a copy of the repository. Arguments select mutations by number, for example
``python tests/mutation.py 3 7``. The exit code is 1 if a mutation survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS_FAILED = 1  # pytest's exit code


@dataclass(frozen=True)
class Mutation:
    """A line to break, and the tests that must notice."""

    description: str
    file: str  # below src/vlm_unlearn
    line: str  # the text to replace, which occurs once
    broken: str
    tests: str  # arguments of pytest


MUTATIONS = (
    Mutation(
        "loss: NPO with the opposite sign",
        "losses.py",
        "F.logsigmoid(beta * (nll - reference_nll))).mean()",
        "F.logsigmoid(beta * (reference_nll - nll))).mean()",
        "tests/test_losses.py tests/methods",
    ),
    Mutation(
        "loss: KL in the other direction",
        "losses.py",
        "(reference.exp() * (reference - current))",
        "(current.exp() * (current - reference))",
        "tests/test_losses.py tests/methods",
    ),
    Mutation(
        "loss: DPO adds the margins",
        "losses.py",
        "(preferred_reference - preferred_nll) - (rejected_reference - rejected_nll)\n",
        "(preferred_reference - preferred_nll) + (rejected_reference - rejected_nll)\n",
        "tests/test_losses.py tests/methods",
    ),
    Mutation(
        "loss: a masked mean divides by all positions",
        "losses.py",
        "weights.sum().clamp(min=1.0)",
        "float(weights.numel())",
        "tests/test_losses.py tests/methods",
    ),
    Mutation(
        "mask: answers are not shifted",
        "losses.py",
        "mask[:, :-1] = labels[:, 1:] != IGNORED",
        "mask[:, :-1] = labels[:, :-1] != IGNORED",
        "tests/test_losses.py tests/methods",
    ),
    Mutation(
        "mask: labels start one token late",
        "data/encoding.py",
        'batch["labels"][row, start + shift : stop + shift] = torch.tensor(ids[start:stop])',
        'batch["labels"][row, start + shift + 1 : stop + shift] = torch.tensor(ids[start + 1 : stop])',
        "tests/modeling",
    ),
    Mutation(
        "mask: packed suffixes attend to later tokens",
        "modeling/shared_attention.py",
        "torch.ones(suffix_length, suffix_length, dtype=torch.bool).tril()",
        "torch.ones(suffix_length, suffix_length, dtype=torch.bool)",
        "tests/modeling/test_packing.py",
    ),
    Mutation(
        "mask: logit masks of merged roles are padded on the left",
        "training/step.py",
        "F.pad(mask, (0, width - mask.shape[1]))",
        "F.pad(mask, (width - mask.shape[1], 0))",
        "tests/training/test_same_training.py tests/modeling/test_packing.py",
    ),
    Mutation(
        "accumulation: each micro-batch has the same weight",
        "training/method_trainer.py",
        "if batches and not self.method.paper_compat:",
        "if False:",
        "tests/training/test_same_training.py",
    ),
    Mutation(
        "resume: trained weights are not restored",
        "training/checkpoints.py",
        "trainable[name].copy_(value)",
        "pass",
        "tests/training/test_kill.py tests/training/test_callbacks.py",
    ),
    Mutation(
        "resume: a truncated checkpoint counts as complete",
        "training/checkpoints.py",
        ".stat().st_size == size for name",
        ".exists() or size for name",
        "tests/training/test_kill.py",
    ),
    Mutation(
        "resume: the order of samples ignores the epoch",
        "training/stream.py",
        'f"{self._seed}-{role}-{epoch}"',
        'f"{self._seed}-{role}"',
        "tests/training/test_stream.py",
    ),
    Mutation(
        "resume: an incomplete last line stays",
        "store/files.py",
        "            drop_incomplete_line(path)\n",
        "            pass\n",
        "tests/store/test_store_files.py",
    ),
    Mutation(
        "resume: failed answers are not requested again",
        "store/evaluation_run.py",
        "if response.key not in failed]",
        "]",
        "tests/generation/test_server.py tests/evaluation/test_evaluate.py",
    ),
    Mutation(
        "interval: groups are ignored",
        "metrics/rates.py",
        "effective = min(float(n), value * (1 - value) / variance)",
        "effective = float(n)",
        "tests/metrics",
    ),
    Mutation(
        "interval: no rule of three",
        "metrics/rates.py",
        "high = max(high, rule_of_three(count))",
        "pass",
        "tests/metrics",
    ),
    Mutation(
        "interval: Holm's correction does not multiply",
        "metrics/paired.py",
        "(len(p_values) - rank) * p_values[index]",
        "p_values[index]",
        "tests/metrics",
    ),
    Mutation(
        "counting: questions with a failed verdict stay",
        "metrics/rates.py",
        " if question not in failed_questions}",
        "}",
        "tests/metrics",
    ),
    Mutation(
        "counting: a failed verdict is a miss",
        "metrics/rates.py",
        'if verdict.label is None and on_error == "exclude":',
        "if False:",
        "tests/metrics",
    ),
    Mutation(
        "counting: one correct rotation of MMBench is enough",
        "benchmarks/mmbench.py",
        "float(all(score.value for score in rotations))",
        "float(any(score.value for score in rotations))",
        "tests/benchmarks",
    ),
    Mutation(
        "counting: the rate with K rewrites uses the Kth alone",
        "evaluation/scoring.py",
        ".rewrite <= last_rewrite]",
        ".rewrite == last_rewrite]",
        "tests/evaluation/test_comparison.py",
    ),
    Mutation(
        "counting: categories of other splits get a rate",
        "evaluation/scoring.py",
        "if prompt.category is not None and prompt.set in metric.splits:",
        "if prompt.category is not None:",
        "tests/evaluation/test_comparison.py",
    ),
    Mutation(
        "escaping: JSON can end its script element",
        "reporting/page.py",
        '.replace("<", "\\\\u003c").replace(">", "\\\\u003e").replace("&", "\\\\u0026")',
        "",
        "tests/reporting/test_report.py tests/reporting/test_answers_page.py tests/reporting/test_answers_hostile.py",
    ),
    Mutation(
        "escaping: CSV cells can be formulas",
        "reporting/tables/csv_text.py",
        'if value.lstrip(" ").startswith(FORMULA_STARTS) else escaped',
        "if False else escaped",
        "tests/reporting/test_report_tables.py",
    ),
    Mutation(
        "escaping: an answer can contain the fence of the judge's prompt",
        "judging/rubric.py",
        '"fence": fence(question, answer, reference),',
        '"fence": "===",',
        "tests/judging/test_rubrics.py",
    ),
)


def main() -> int:
    numbers = [int(argument) for argument in sys.argv[1:]] or range(len(MUTATIONS))
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "vlm-unlearn"
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, files.split("\0")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        for number in numbers:
            mutation, start = MUTATIONS[number], time.monotonic()
            caught_by = run_tests(copy, mutation)
            survivors += not caught_by
            result = f"caught by {caught_by}" if caught_by else "SURVIVED"
            sys.stdout.write(f"{number:2} {mutation.description}: {result} ({time.monotonic() - start:.0f} s)\n")
            sys.stdout.flush()
    return int(survivors > 0)


def run_tests(copy: Path, mutation: Mutation) -> str:
    """Returns the first test that fails with the mutation, or an empty text if none fails."""
    file = copy / "src" / "vlm_unlearn" / mutation.file
    original = file.read_text(encoding="utf-8")
    assert original.count(mutation.line) == 1, f"{mutation.description}: the line must occur once in {mutation.file}"
    file.write_text(original.replace(mutation.line, mutation.broken), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(copy / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-rf", "-p", "no:cacheprovider", *mutation.tests.split()],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        file.write_text(original, encoding="utf-8")
    assert done.returncode in (0, TESTS_FAILED), done.stdout[-2000:]
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return failed[0] if failed else ""


if __name__ == "__main__":
    raise SystemExit(main())
