"""One abstract trace of a denoiser: standard operators around one node a quantizable linear.

The trace holds no quantized weight: the lowering passes add what each target stores.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, nn

from ..calibrate.families.base import Family
from ..calibrate.plan import LinearSpec
from ..errors import StepError
from .abstract import abstract_linears, mark_blocks, tabulate_timesteps
from .attention import translations
from .opsets import LINEAR_OP, QDIT_DOMAIN, ComputeDtype, torch_dtype
from .passes.clean_up import clean_up
from .passes.name_values import NameValuesPass

_ROOT = "denoiser"  # the attribute of `_Exported` that parameter names start with
_EXAMPLE_BATCH = 2  # torch.export takes a batch of 1 for a constant


class _Exported(nn.Module):
    """The denoiser with the exported signature: float32 in and out, whatever it computes in."""

    def __init__(self, denoiser: nn.Module, family: Family) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.family = family

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.family.forward(self.denoiser, *inputs).float()


def trace(
    denoiser: nn.Module,
    family: Family,
    linears: Sequence[LinearSpec],
    *,
    dtype: ComputeDtype,
    opset: int,
) -> ir.Model:
    """Trace `denoiser` (changed in place: pass a skeleton) into the abstract model.

    Ensures: inputs and output named as the family says, float32, dynamic in dimension 'batch';
    exactly one `qdit::GroupQuantLinear(layer=name)` a linear and one `qdit::BlockOutput` a block;
    everything else standard operators in `dtype`; readable, unique names; constants folded, equal
    subexpressions and equal small initializers merged. Raises `StepError` where torch cannot
    trace the model.
    """
    tabulate_timesteps(denoiser)
    abstract_linears(denoiser, linears)
    mark_blocks(denoiser, family.blocks(denoiser))
    names = _parameter_names(denoiser)
    model = _export(_Exported(denoiser.to(torch_dtype(dtype)), family).eval(), family, opset)
    clean_up()(model)
    NameValuesPass(_ROOT, names)(model)
    common.ClearMetadataAndDocStringPass()(model)  # stack traces with this machine's paths
    _check_linears(model, linears)
    return model


def _export(module: _Exported, family: Family, opset: int) -> ir.Model:
    generator = torch.Generator().manual_seed(0)
    inputs = family.example_inputs(module.denoiser, _EXAMPLE_BATCH, generator)
    batch = torch.export.Dim("batch")
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                opset_version=opset,
                input_names=[spec.name for spec in family.inputs(module.denoiser)],
                output_names=[family.output_name],
                dynamic_shapes=(tuple({0: batch} for _ in inputs),),
                custom_translation_table=translations(opset),
                optimize=False,  # torch's optimizer takes most of the time; clean_up() does as much
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever the model's code raises
        raise StepError(f"torch cannot trace this {family.name} model for opset {opset}") from error
    if program is None:
        raise StepError("torch.onnx.export returned no program")
    return program.model


def _parameter_names(denoiser: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer → its first name, which tied ones are exported under."""
    first: dict[int, str] = {}
    tensors = [
        *denoiser.named_parameters(remove_duplicate=False),
        *denoiser.named_buffers(remove_duplicate=False),
    ]
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


def _check_linears(model: ir.Model, linears: Sequence[LinearSpec]) -> None:
    traced = [
        node.attributes["layer"].as_string()
        for node in model.graph
        if (node.domain, node.op_type) == (QDIT_DOMAIN, LINEAR_OP)
    ]
    if sorted(traced) != sorted(spec.name for spec in linears):
        missing = {spec.name for spec in linears} - set(traced)
        raise StepError(
            f"the trace must hold each of {len(linears)} linears once, got {len(traced)}; "
            f"missing: {', '.join(sorted(missing)) or 'none, some are doubled'}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes about torchvision and about its own deprecated internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
