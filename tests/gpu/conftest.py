"""The device of the tests in this folder. With VLM_UNLEARN_GPU_TESTS_ON=cpu, most of them also run on a CPU."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    if os.environ.get("VLM_UNLEARN_GPU_TESTS_ON") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda")


@pytest.fixture(scope="session")
def cuda(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("measures CUDA itself")
    return device
