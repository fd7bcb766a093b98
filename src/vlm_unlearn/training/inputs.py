"""The model, processor and data of a training run, loaded for one run or shared by several runs of a process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.processor_call import Processor
from vlm_unlearn.modeling.features import FeatureCache, cache_vision_features
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.store import digest_model

if TYPE_CHECKING:
    from vlm_unlearn.config import Recipe


class Inputs:
    """Loads everything that a training run reads, each time that it is needed."""

    def training_set(self, recipe: Recipe) -> UnlearningDataset:
        """Returns the training set of a recipe.

        Raises:
            UserError: The folder is not a valid training set.
        """
        training_set = UnlearningDataset.from_folder(recipe.data)
        training_set.image_loader = recipe.image_loader
        return training_set

    def data_digest(self, training_set: UnlearningDataset) -> dict[str, str]:
        """Returns the fingerprint of a training set."""
        return training_set.fingerprint()

    def processor(self, model_path: Path, image_aspect_ratio: Any) -> Processor:
        """Returns the processor of a model folder. See `load_processor`."""
        return load_processor(model_path, image_aspect_ratio)

    def model_digest(self, model_path: Path) -> str:
        """Returns the digest of a model folder."""
        return digest_model(model_path)

    def model(self, model_path: Path, precision: str, attn_implementation: str, in_4_bits: bool) -> Any:
        """Returns a model that the caller may change. See `load_model`."""
        return load_model(model_path, precision, attn_implementation, in_4_bits=in_4_bits)

    def vision_features(
        self, vlm: VisionLanguageModel, recipe: Recipe, model_path: Path
    ) -> AbstractContextManager[None]:
        """Returns a context in which a frozen vision tower runs each image once for all runs that share it."""
        return nullcontext()

    def shares_features(self, recipe: Recipe) -> bool:
        """Returns whether `vision_features` replaces the run's own cache of image features."""
        return False


class SharedInputs(Inputs):
    """Loads each model, processor and training set once for all runs of this process.

    Their files must not change in the meantime. The loaded models stay in main memory, and each run gets a copy. Models
    in 4 bits are loaded for each run.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[object, ...], Any] = {}

    def _once(self, key: tuple[object, ...], load: Any) -> Any:
        if key not in self._values:
            self._values[key] = load()
        return self._values[key]

    def training_set(self, recipe: Recipe) -> UnlearningDataset:
        key = ("data", recipe.data.absolute(), recipe.image_loader)
        training_set: UnlearningDataset = self._once(key, lambda: Inputs.training_set(self, recipe))
        return training_set

    def data_digest(self, training_set: UnlearningDataset) -> dict[str, str]:
        # The data sets of `training_set` live as long as this object, so that their ids are unique.
        digest: dict[str, str] = self._once(("data digest", id(training_set)), training_set.fingerprint)
        return dict(digest)

    def processor(self, model_path: Path, image_aspect_ratio: Any) -> Processor:
        key = ("processor", model_path.absolute(), image_aspect_ratio)
        return self._once(key, lambda: load_processor(model_path, image_aspect_ratio))

    def model_digest(self, model_path: Path) -> str:
        digest: str = self._once(("model digest", model_path.absolute()), lambda: digest_model(model_path))
        return digest

    def model(self, model_path: Path, precision: str, attn_implementation: str, in_4_bits: bool) -> Any:
        if in_4_bits:
            return super().model(model_path, precision, attn_implementation, in_4_bits)
        key = ("model", model_path.absolute(), precision, attn_implementation)
        return copy.deepcopy(self._once(key, lambda: load_model(model_path, precision, attn_implementation)))

    def shares_features(self, recipe: Recipe) -> bool:
        return recipe.training.feature_cache == "memory" and not recipe.trainable.vision_tower

    @contextmanager
    def vision_features(self, vlm: VisionLanguageModel, recipe: Recipe, model_path: Path) -> Iterator[None]:
        tower = vlm.vision_tower
        if not self.shares_features(recipe) or any(parameter.requires_grad for parameter in tower.parameters()):
            yield
            return
        dtype = next(tower.parameters()).dtype
        key = ("features", model_path.absolute(), dtype, recipe.training.attn_implementation)
        limit = int(recipe.training.feature_cache_gb * 2**30)
        restore = cache_vision_features(tower, self._once(key, lambda: FeatureCache(limit)))
        try:
            yield
        finally:
            restore()
