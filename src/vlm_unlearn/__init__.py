"""vlm-unlearn: unlearns harmful knowledge in vision-language models, and measures how well it worked.

The names of the public API are imported when they are first used, so that ``import vlm_unlearn`` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_unlearn.data.dataset import UnlearningDataset
    from vlm_unlearn.errors import RunError, UserError
    from vlm_unlearn.evaluation import EvaluationResult, evaluate
    from vlm_unlearn.judging import judge
    from vlm_unlearn.metrics import ASR, SARR, DegenerateRate, LabelRate, MeanScore, RefusalRate
    from vlm_unlearn.modeling.vlm import VisionLanguageModel
    from vlm_unlearn.training.arguments import UnlearningConfig
    from vlm_unlearn.training.runner import run_recipe
    from vlm_unlearn.training.trainer import UnlearningTrainer

__all__ = [
    "ASR",
    "SARR",
    "DegenerateRate",
    "EvaluationResult",
    "LabelRate",
    "MeanScore",
    "RefusalRate",
    "RunError",
    "UnlearningConfig",
    "UnlearningDataset",
    "UnlearningTrainer",
    "UserError",
    "VisionLanguageModel",
    "evaluate",
    "judge",
    "run_recipe",
]

_MODULES = {
    "ASR": "vlm_unlearn.metrics",
    "SARR": "vlm_unlearn.metrics",
    "DegenerateRate": "vlm_unlearn.metrics",
    "EvaluationResult": "vlm_unlearn.evaluation",
    "LabelRate": "vlm_unlearn.metrics",
    "MeanScore": "vlm_unlearn.metrics",
    "RefusalRate": "vlm_unlearn.metrics",
    "RunError": "vlm_unlearn.errors",
    "UnlearningConfig": "vlm_unlearn.training.arguments",
    "UnlearningDataset": "vlm_unlearn.data.dataset",
    "UnlearningTrainer": "vlm_unlearn.training.trainer",
    "UserError": "vlm_unlearn.errors",
    "VisionLanguageModel": "vlm_unlearn.modeling.vlm",
    "evaluate": "vlm_unlearn.evaluation",
    "judge": "vlm_unlearn.judging",
    "run_recipe": "vlm_unlearn.training.runner",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
