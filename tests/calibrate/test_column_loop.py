"""The column loop as a CUDA graph needs it: no value is read back, no branch depends on one."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from qdit.calibrate.column_loop import ColumnLoop, LoopShape
from qdit.calibrate.schemes import LayerScheme


@pytest.mark.parametrize("clipped", [True, False], ids=["clipped", "full range"])
@pytest.mark.parametrize("group", [32, None], ids=["g32", "given"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"weight_symmetric": False}, {"scale_format": "integer"}],
    ids=["symmetric", "asymmetric", "integer scales"],
)
def test_the_loop_never_waits_for_a_value(fields: dict, group: int | None, clipped: bool) -> None:
    shape = LoopShape(64, 8, group, LayerScheme(4, 16, 32, **fields), clipped)
    with FakeTensorMode():  # tensors without data: to ask for a value is an error
        with pytest.raises(DataDependentOutputException):
            bool(torch.ones(1) > 0)
        loop = ColumnLoop(shape, torch.ones(1))
        loop.run_eagerly()
        assert loop.values.shape == loop.errors.shape == (64, 8)
        assert loop.scale.shape == (2 if group else 64, 8)
