"""Sweeps: many trained models, compared by two or more objectives, on one or more machines (Optuna)."""

from vlm_unlearn.sweeps.records import SweepResult as SweepResult
from vlm_unlearn.sweeps.records import Trial as Trial
from vlm_unlearn.sweeps.runner import run_sweep as run_sweep
