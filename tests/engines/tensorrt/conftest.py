"""What the TensorRT tests of this folder share with those of the lowerings."""

from __future__ import annotations

import pytest

from ...export.conftest import make_small_model
from ...export.tensorrt.conftest import Traced


@pytest.fixture(scope="session")
def traced() -> Traced:
    return Traced(make_small_model(1))
