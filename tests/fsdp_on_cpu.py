"""Runs ``vlm-unlearn`` under FSDP2 without a GPU.

On a CPU, accelerate falls back to DDP. It uses FSDP2 only if the distributed type is that of GPUs.
"""

from __future__ import annotations

from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from vlm_unlearn.cli.main import main
from vlm_unlearn.training.method_trainer import MethodTrainer


def _prepare_backend(self: PartialState, *arguments: Any, **keywords: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


class _ShardedTrainer(MethodTrainer):
    """Checks that FSDP2 has sharded all parameters."""

    def compute_loss(self, model: Any, *arguments: Any, **keywords: Any) -> Any:
        from torch.distributed.tensor import DTensor

        assert all(isinstance(parameter, DTensor) for parameter in model.parameters()), "parameters are not sharded"
        return super().compute_loss(model, *arguments, **keywords)


if __name__ == "__main__":
    PartialState._prepare_backend = _prepare_backend
    import vlm_unlearn.training.runner as runner

    runner.MethodTrainer = _ShardedTrainer  # type: ignore[misc]
    main()
