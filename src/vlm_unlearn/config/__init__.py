"""Recipes (what to train) and suites (what to measure): YAML plus dotted overrides. Unknown keys are refused."""

from vlm_unlearn.config.base import Strict as Strict
from vlm_unlearn.config.loading import load as load
from vlm_unlearn.config.loading import override as override
from vlm_unlearn.config.loading import resolved as resolved
from vlm_unlearn.config.loading import shipped as shipped
from vlm_unlearn.config.loading import shipped_names as shipped_names
from vlm_unlearn.config.loading import to_start_from as to_start_from
from vlm_unlearn.config.loading import validate as validate
from vlm_unlearn.config.recipe import MethodConfig as MethodConfig
from vlm_unlearn.config.recipe import ProbeConfig as ProbeConfig
from vlm_unlearn.config.recipe import Recipe as Recipe
from vlm_unlearn.config.recipe import TrainableConfig as TrainableConfig
from vlm_unlearn.config.suite import BenchmarkConfig as BenchmarkConfig
from vlm_unlearn.config.suite import CaseConfig as CaseConfig
from vlm_unlearn.config.suite import GenerationConfig as GenerationConfig
from vlm_unlearn.config.suite import JudgeConfig as JudgeConfig
from vlm_unlearn.config.suite import MetricConfig as MetricConfig
from vlm_unlearn.config.suite import RewriteConfig as RewriteConfig
from vlm_unlearn.config.suite import SampleConfig as SampleConfig
from vlm_unlearn.config.suite import Suite as Suite
