"""The choice among PyTorch's kernels for attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Excludes cuDNN from the kernels of `scaled_dot_product_attention` for the duration of the block.

    cuDNN prepares a plan for every new shape of its inputs. Batches of text almost always have new shapes: of a step
    of LLaVA-1.5-7B on an H100 that takes 0.3 s, the first with new shapes takes 2.6 s.
    """
    enabled: bool = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)
