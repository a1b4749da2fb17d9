"""Set-up of the calibration tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # matrices here are tiny: waking a second thread costs more than its work, twice over in CI
    torch.set_num_threads(1)
