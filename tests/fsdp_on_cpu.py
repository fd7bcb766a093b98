"""``vlm-unlearn`` under FSDP2 without a GPU: accelerate falls back to DDP there unless it is told that the backend is a GPU's."""

from __future__ import annotations

from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from vlm_unlearn.cli.main import main
from vlm_unlearn.training.trainer import UnlearningTrainer


def _prepare_backend(self: PartialState, *arguments: Any, **keywords: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


class _Checked(UnlearningTrainer):
    def compute_loss(self, model: Any, *arguments: Any, **keywords: Any) -> Any:
        from torch.distributed.tensor import DTensor

        assert all(isinstance(parameter, DTensor) for parameter in model.parameters()), "nothing is cut up"
        return super().compute_loss(model, *arguments, **keywords)


if __name__ == "__main__":
    PartialState._prepare_backend = _prepare_backend
    import vlm_unlearn.training.runner as runner

    runner.UnlearningTrainer = _Checked  # type: ignore[misc]
    main()
