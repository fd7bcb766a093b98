"""The names of ``vlm_unlearn`` itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

import vlm_unlearn

LIGHT = """
import sys, time
started = time.perf_counter()
import vlm_unlearn
dir(vlm_unlearn)
print(time.perf_counter() - started, *(name for name in ("torch", "transformers", "pydantic") if name in sys.modules))
"""


@pytest.mark.multiprocess
def test_import_is_fast_and_loads_no_heavy_module() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=50, check=True)
    seconds, *loaded = done.stdout.split()
    assert not loaded
    assert float(seconds) < 0.2


@pytest.mark.parametrize("name", vlm_unlearn.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    assert getattr(vlm_unlearn, name).__doc__


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'UnlearningTrainerr'"):
        vlm_unlearn.UnlearningTrainerr  # noqa: B018


def test_names_in_all_and_in_the_lazy_table_are_the_same() -> None:
    assert vlm_unlearn.__all__ == list(vlm_unlearn._MODULES)
