"""The worlds with planted models, one for each seed."""

from __future__ import annotations

import pytest

from planted_models import SEEDS, PlantedWorld


@pytest.fixture(scope="module", params=SEEDS)
def planted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PlantedWorld:
    return PlantedWorld(tmp_path_factory.mktemp("planted"), request.param)
