"""Recipes (training) and suites (measurement): YAML files with dotted overrides. Unknown keys are errors."""

from vlm_unlearn.config.base import Strict as Strict
from vlm_unlearn.config.judges import JudgeConfig as JudgeConfig
from vlm_unlearn.config.loader import apply_overrides as apply_overrides
from vlm_unlearn.config.loader import load as load
from vlm_unlearn.config.loader import read_resolved as read_resolved
from vlm_unlearn.config.loader import shipped_names as shipped_names
from vlm_unlearn.config.loader import shipped_path as shipped_path
from vlm_unlearn.config.loader import starter_text as starter_text
from vlm_unlearn.config.loader import validate as validate
from vlm_unlearn.config.recipe import DefenseConfig as DefenseConfig
from vlm_unlearn.config.recipe import MethodConfig as MethodConfig
from vlm_unlearn.config.recipe import ProbeConfig as ProbeConfig
from vlm_unlearn.config.recipe import Recipe as Recipe
from vlm_unlearn.config.recipe import TrainableConfig as TrainableConfig
from vlm_unlearn.config.robustness import Budget as Budget
from vlm_unlearn.config.robustness import ModelAttackConfig as ModelAttackConfig
from vlm_unlearn.config.robustness import RobustnessSuite as RobustnessSuite
from vlm_unlearn.config.splits import AttackConfig as AttackConfig
from vlm_unlearn.config.splits import RewriteConfig as RewriteConfig
from vlm_unlearn.config.splits import SampleConfig as SampleConfig
from vlm_unlearn.config.splits import SplitConfig as SplitConfig
from vlm_unlearn.config.suite import BenchmarkConfig as BenchmarkConfig
from vlm_unlearn.config.suite import ChatConfig as ChatConfig
from vlm_unlearn.config.suite import GenerationConfig as GenerationConfig
from vlm_unlearn.config.suite import MetricConfig as MetricConfig
from vlm_unlearn.config.suite import Suite as Suite
