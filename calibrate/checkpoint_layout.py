"""Which tensors a checkpoint's tensor file holds, and how a weight becomes some of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .artifact_errors import (
    MissingTensorError,
    NonFiniteError,
    PaddingError,
    ScaleRangeError,
    ShapeMismatchError,
    UnknownTensorError,
    WrongDtypeError,
)
from .integer_scales import CHANNEL_SCALE_BITS, is_channel_scale
from .packing import pack, packed_width, padding_is_zero, unpack
from .plan import LinearSpec, QuantizationPlan
from .quantizers import QuantizedWeight
from .schemes import LARGEST_MULTIPLIER, MULTIPLIER_BITS, LayerScheme
from .tensor_file import DTYPE_NAMES, TensorEntry, TensorFile

PACKED, SCALE, ZERO_POINT, MULTIPLIER = "packed", "scale", "zero_point", "multiplier"
_SCALE_DTYPES = {"float16": torch.float16, "float32": torch.float32}


def quantized_linears(plan: QuantizationPlan, linears: Iterable[LinearSpec]) -> list[LinearSpec]:
    """The linears whose weights the plan quantizes; the others stay untouched parameters."""
    return [spec for spec in linears if plan[spec.name].quantizes_weights]


def tensor_name(linear: str, part: str) -> str:
    """'….to_q' and 'scale' → '….to_q.weight.scale'."""
    return f"{linear}.weight.{part}"


def weight_entries(spec: LinearSpec, scheme: LayerScheme) -> dict[str, TensorEntry]:
    """One quantized weight by part: packed [N, ⌈K·b/8⌉], scale [N, G], zero_point flat; with
    integer scales scale [N, 1], multiplier flat."""
    groups = spec.in_features // scheme.weight_group_size(spec.in_features)
    rows, bits = spec.out_features, scheme.weight_bits
    scales = 1 if scheme.has_integer_scales else groups
    entries = {
        PACKED: TensorEntry("U8", (rows, packed_width(spec.in_features, bits))),
        SCALE: TensorEntry(DTYPE_NAMES[_SCALE_DTYPES[scheme.scale_dtype]], (rows, scales)),
    }
    if not scheme.weight_symmetric:
        entries[ZERO_POINT] = TensorEntry("U8", (packed_width(rows * groups, bits),))
    if scheme.has_integer_scales:
        entries[MULTIPLIER] = TensorEntry("U8", (packed_width(rows * groups, MULTIPLIER_BITS),))
    return entries


def encode_part(weight: QuantizedWeight, scheme: LayerScheme, part: str) -> Tensor:
    """One tensor of `weight_entries` for a weight that `check_weight` has passed."""
    if part == SCALE:
        return _stored_scale(weight).to(_SCALE_DTYPES[scheme.scale_dtype])
    if part == PACKED:
        return pack(weight.values, scheme.weight_bits, scheme.weight_symmetric)
    if part == MULTIPLIER and weight.multiplier is not None:
        # 1 … 16 as 0 … 15
        return pack(weight.multiplier.reshape(1, -1) - 1, MULTIPLIER_BITS, False).view(-1)
    if part == ZERO_POINT and weight.zero_point is not None:
        return pack(weight.zero_point.reshape(1, -1), scheme.weight_bits, False).view(-1)
    raise ValueError(f"the weight has no {part} to encode")


def _stored_scale(weight: QuantizedWeight) -> Tensor:
    return weight.scale if weight.multiplier is None else weight.channel_scale


def check_weight(weight: QuantizedWeight, spec: LinearSpec, scheme: LayerScheme) -> None:
    """Raise `InputError` unless `weight` has the form that spec and scheme call for.

    Shapes, bits, symmetry and scale format must agree; scales must be finite, positive and exact
    in the scheme's scale dtype, and with integer scales those of a channel its one scale times
    multipliers of 1 … 16. The integers' range is checked when they are packed.
    """
    _check_form(weight, spec, scheme)
    if weight.multiplier is not None:
        _check_multipliers(weight, weight.multiplier, spec.name)
    scale = _stored_scale(weight)
    if not torch.equal(encode_part(weight, scheme, SCALE).to(scale.dtype), scale):
        raise InputError(
            f"the scales of {spec.name} must be exact in {scheme.scale_dtype}; "
            "round them before the integers are chosen (integers.round_scale)"
        )
    check_scales(scale, spec.name, scheme)


def _check_multipliers(weight: QuantizedWeight, multiplier: Tensor, name: str) -> None:
    low, high = (int(bound) for bound in multiplier.aminmax())
    if low < 1 or high > LARGEST_MULTIPLIER:
        raise InputError(
            f"the multipliers of {name} must lie in [1, {LARGEST_MULTIPLIER}], got [{low}, {high}];"
            " choose them by integer_scales.choose_integer_scales"
        )
    if not torch.equal(weight.channel_scale * multiplier, weight.scale):
        raise InputError(
            f"the scales of {name} must be the channel's scale times its multipliers, exactly; "
            "choose them by integer_scales.choose_integer_scales"
        )


def _check_form(weight: QuantizedWeight, spec: LinearSpec, scheme: LayerScheme) -> None:
    rows, columns = spec.out_features, spec.in_features
    scales = (rows, columns // scheme.weight_group_size(columns))
    found = (
        *(
            None if tensor is None else tuple(tensor.shape)
            for tensor in (weight.values, weight.scale, weight.zero_point, weight.multiplier)
        ),
        weight.bits,
    )
    expected = (
        (rows, columns),
        scales,
        None if scheme.weight_symmetric else scales,
        scales if scheme.has_integer_scales else None,
        scheme.weight_bits,
    )
    if found != expected:
        raise InputError(
            f"the weight of {spec.name} must have shapes of values, scales, zero points and "
            f"multipliers, and bits, {expected} by its scheme {scheme.label}, got {found}; "
            "quantize it by the same plan"
        )


def expected_entries(
    plan: QuantizationPlan, linears: Sequence[LinearSpec], untouched: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Every tensor of the file by name: the dtypes it may have, and its shape."""
    expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        name: (("F16", "F32"), shape) for name, shape in untouched.items()
    }
    for spec in quantized_linears(plan, linears):
        for part, entry in weight_entries(spec, plan[spec.name]).items():
            expected[tensor_name(spec.name, part)] = ((entry.dtype,), entry.shape)
    return expected


def check_entries(
    found: Mapping[str, TensorEntry],
    expected: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]],
    where: object,
) -> None:
    """Raise a named error unless exactly `expected` was `found`, dtypes and shapes included."""
    for name, (dtypes, shape) in expected.items():
        if name not in found:
            raise MissingTensorError(f"{where} lacks the tensor {name}; export the model again")
        entry = found[name]
        if entry.dtype not in dtypes:
            raise WrongDtypeError(
                f"{where}: tensor {name} must be {' or '.join(dtypes)}, got {entry.dtype}"
            )
        if entry.shape != shape:
            raise ShapeMismatchError(
                f"{where}: tensor {name} must have shape {list(shape)} by config and plan, "
                f"got {list(entry.shape)}"
            )
    for name in found:
        if name not in expected:
            raise UnknownTensorError(
                f"{where} has the tensor {name}, which the model and its plan do not call for"
            )


def check_scales(scale: Tensor, name: str, scheme: LayerScheme) -> None:
    """Raise `NonFiniteError` or `ScaleRangeError` unless all scales, as stored, are finite,
    positive, and with integer scales exact in float32 under every multiplier."""
    if not bool(scale.isfinite().all()):
        raise NonFiniteError(f"the scales of {name} must be finite, some are NaN or infinite")
    if scale.numel() and float(scale.min()) <= 0:
        raise ScaleRangeError(f"the scales of {name} must be positive, got {float(scale.min())}")
    if scheme.has_integer_scales and not is_channel_scale(scale):
        raise ScaleRangeError(
            f"the scales of {name} must have at most {CHANNEL_SCALE_BITS} significant bits and be "
            f"finite {LARGEST_MULTIPLIER} times over, so that float32 holds every multiple"
        )


def check_values(
    file: TensorFile,
    plan: QuantizationPlan,
    linears: Sequence[LinearSpec],
    untouched: Iterable[str],
) -> None:
    """Raise a named error for numbers that no writer makes: bad scales, padding, NaN."""
    for spec in quantized_linears(plan, linears):
        scheme = plan[spec.name]
        check_scales(file.read(tensor_name(spec.name, SCALE)), spec.name, scheme)
        for part, columns, bits in _streams(spec, scheme):
            if columns * bits % 8 == 0:
                continue  # no padding: spare the reading
            name = tensor_name(spec.name, part)
            rows = file.read(name).view(-1, packed_width(columns, bits))
            if not padding_is_zero(rows, columns, bits):
                raise PaddingError(f"{file.path}: the padding bits of {name} must be 0")
    for name in untouched:
        if not bool(file.read(name).isfinite().all()):
            raise NonFiniteError(f"{file.path}: {name} must be finite, it holds NaN or infinity")


def _streams(spec: LinearSpec, scheme: LayerScheme) -> list[tuple[str, int, int]]:
    """The packed parts of one weight: (part, integers a row, bits of each)."""
    count = spec.out_features * (spec.in_features // scheme.weight_group_size(spec.in_features))
    streams = [(PACKED, spec.in_features, scheme.weight_bits)]
    if not scheme.weight_symmetric:
        streams.append((ZERO_POINT, count, scheme.weight_bits))
    if scheme.has_integer_scales:
        streams.append((MULTIPLIER, count, MULTIPLIER_BITS))
    return streams


class StoredWeights(Mapping[str, QuantizedWeight]):
    """The quantized weights of a tensor file by linear name, unpacked anew on each access."""

    def __init__(
        self, file: TensorFile, plan: QuantizationPlan, linears: Sequence[LinearSpec]
    ) -> None:
        self._file = file
        self._plan = plan
        self._specs = {spec.name: spec for spec in quantized_linears(plan, linears)}

    def __getitem__(self, name: str) -> QuantizedWeight:
        spec, scheme = self._specs[name], self._plan[name]
        bits, symmetric = scheme.weight_bits, scheme.weight_symmetric
        groups = spec.in_features // scheme.weight_group_size(spec.in_features)
        packed = self._file.read(tensor_name(name, PACKED))
        scale = self._file.read(tensor_name(name, SCALE)).float()
        zero_point = multiplier = None
        if not symmetric:
            zero_point = self._unpacked(name, ZERO_POINT, groups, bits)
        if scheme.has_integer_scales:
            multiplier = self._unpacked(name, MULTIPLIER, groups, MULTIPLIER_BITS) + 1
            scale = scale * multiplier
        values = unpack(packed, spec.in_features, bits, symmetric)
        return QuantizedWeight(values, scale, zero_point, bits, multiplier)

    def _unpacked(self, name: str, part: str, groups: int, bits: int) -> Tensor:
        """uint8 [N, G] from a part that is packed as one row."""
        rows = self._specs[name].out_features
        flat = self._file.read(tensor_name(name, part)).view(1, -1)
        return unpack(flat, rows * groups, bits, False).view(rows, groups)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


class StoredParameters(Mapping[str, Tensor]):
    """The untouched parameters of a tensor file, read on access in their stored dtype."""

    def __init__(self, file: TensorFile, names: Iterable[str]) -> None:
        self._file = file
        self._names = dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def stored_parameter(value: Tensor, name: str) -> Tensor:
    """`value` as the file keeps it: float16, or float32 where a value would overflow float16.

    Raises `InputError` for NaN and infinity, and for what is not floating-point.
    """
    if not value.is_floating_point():
        raise InputError(f"parameter {name} must be floating-point, got {value.dtype}")
    value = value.detach().cpu()
    if not bool(value.isfinite().all()):
        raise InputError(f"parameter {name} must be finite, it holds NaN or infinity")
    half = value.to(torch.float16)
    return half if bool(half.isfinite().all()) else value.to(torch.float32)
