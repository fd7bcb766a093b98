"""MMBench-CN: MMBench (Liu et al. 2023, arXiv 2307.06281) with Chinese questions and options, circular evaluation."""

from __future__ import annotations

from vlm_unlearn.benchmarks.base import register
from vlm_unlearn.benchmarks.mmbench import MMBench


@register(
    "mmbench_cn",
    "mmbench_dev_cn_20231003.tsv (circular) or another Chinese TSV of the MMBench repository; "
    "the test files have no answers",
    "inside the TSV; they are unpacked into the cache folder",
)
class MMBenchCN(MMBench):
    """Share of questions that are answered right in all rotations of their options, as in MMBench.

    An answer without an option letter is wrong. The published evaluator asks a language model to find an option in it.
    """

    instruction = "请直接回答选项字母。"
