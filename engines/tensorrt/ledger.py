"""Which precision each quantized linear really runs in: requested against executed.

Source of what is executed: TensorRT's engine inspector, whose JSON has one entry a layer with its
name, the formats of its inputs and outputs, its tactic, and the ONNX nodes that were fused into it.
Where TensorRT's graph compiler (Myelin) took a region of the network, 8.6 shows one entry for all
of it, '{ForeignNode[first node...last node]}', whose formats are those of the region's ends and say
nothing of the products inside; published answers of 10 have Myelin's kernels one by one, with the
ONNX nodes in their metadata. What a region hides may still be proved by the names of the kernels
that the engine launches, by counting (`with_kernels`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import ArtifactError, StepError
from ...files import write_json

REQUESTED = "precision"  # the key in 'qdit.linears' (export/tensorrt/lower_int8.py)
INPUT = "input"  # … the tensor that a linear reads
LINEARS_KEY = "qdit.linears"
_QUANTIZED = ("INT8", "INT4", "PLUGIN")
_FORMATS = (
    ("INT8", ("int8",)),
    ("INT4", ("int4",)),
    ("FP8", ("fp8",)),
    ("FP16", ("fp16", "half", "bf16")),
    ("FP32", ("fp32", "float")),
)
_PASSIVE = ("Reformat", "Shuffle", "Constant", "NoOp", "Slice", "Cast", "Scale")
_REGION = "{ForeignNode["
HIDDEN = "hidden"
BY_KERNELS = "INT8 by kernels"
NOT_FOUND = "not found"


@dataclass(frozen=True)
class LedgerRow:
    """One linear: the precision that its file asks for, what ran, and in which layer of the engine.

    `executed` is 'hidden' where the inspector shows no layer of it, but regions that hide what is
    in them: `layer` is then the region that must hold it, '' where it may be one of several. It is
    'not found' where there is no such region either. Both are no proof of anything. A hidden one is
    'INT8 by kernels' where the kernels that are launched leave no other choice; `layer` says how
    many there are.
    """

    linear: str
    requested: str
    executed: str
    layer: str

    @property
    def fell_back(self) -> bool:
        """Whether a quantized linear runs in floating point."""
        return self.requested in _QUANTIZED and self.executed in ("FP16", "FP32")

    @property
    def is_open(self) -> bool:
        """Whether nothing shows what a quantized linear runs in: no INT8, and no fallback."""
        return self.requested in _QUANTIZED and self.executed in (HIDDEN, NOT_FOUND)


@dataclass(frozen=True)
class Ledger:
    """The rows of all linears, in model order."""

    rows: tuple[LedgerRow, ...]

    @property
    def fallbacks(self) -> list[LedgerRow]:
        return [row for row in self.rows if row.fell_back]

    @property
    def unproved(self) -> list[LedgerRow]:
        return [row for row in self.rows if row.is_open]

    @property
    def summary(self) -> str:
        """'42 INT8, 8 FP16; 0 of 42 quantized linears fell back'.

        With unproved ones: '56 hidden; 48 of 48 quantized linears unproved, 0 of the other 0 fell
        back'.
        """
        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row.executed] = counts.get(row.executed, 0) + 1
        total = sum(row.requested in _QUANTIZED for row in self.rows)
        text = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        fell, unknown = len(self.fallbacks), len(self.unproved)
        if not unknown:
            return f"{text}; {fell} of {total} quantized linears fell back"
        return (
            f"{text}; {unknown} of {total} quantized linears unproved, "
            f"{fell} of the other {total - unknown} fell back"
        )

    def check(self, allow_fallback: bool) -> None:
        """Raise `StepError` when a quantized linear runs in FP16 or FP32, unless allowed.

        An unproved one is no fallback: it is counted, and nothing is allowed or refused for it.
        """
        if self.fallbacks and not allow_fallback:
            first = self.fallbacks[0]
            raise StepError(
                f"{len(self.fallbacks)} quantized linears run in floating point, the first "
                f"{first.linear}: {first.requested} was asked for, {first.executed} runs in layer "
                f"{first.layer!r}; --allow-fallback builds the engine all the same"
            )

    def write(self, path: Path) -> None:
        write_json(path, [asdict(row) for row in self.rows])

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """Raises `ArtifactError` for what is no ledger."""
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            return cls(tuple(LedgerRow(**row) for row in rows))
        except (OSError, ValueError, TypeError) as error:
            raise ArtifactError(f"{path} is no readable precision ledger: {error}") from error


def make_ledger(
    linears: Mapping[str, Mapping[str, Any]], engine_layers: Sequence[Mapping[str, Any]]
) -> Ledger:
    """Match every linear of a file ('qdit.linears') with the engine's layers.

    A linear's product is the node called '<linear>/product' (or '<linear>.output' without a bias),
    or the plugin node called by its own name. Of several layers that name it, the one that holds
    the product is the first whose type is no reformat, shuffle or constant, and which is no region.
    """
    regions = [layer for layer in engine_layers if _is_region(layer)]
    shown = [
        layer
        for layer in engine_layers
        if layer.get("LayerType") not in _PASSIVE and not _is_region(layer)
    ]
    rows = []
    for name, record in linears.items():
        requested = str(record.get(REQUESTED, "FP16"))
        layer = next(iter(_naming(name, shown)), None)
        if layer is not None:
            executed, place = _precision_of(layer, requested), str(layer.get("Name", ""))
        else:
            executed, place = (HIDDEN if regions else NOT_FOUND), _region_of(name, regions)
        rows.append(LedgerRow(name, requested, executed, place))
    return Ledger(tuple(rows))


def with_kernels(
    ledger: Ledger,
    linears: Mapping[str, Mapping[str, Any]],
    *,
    integer: int,
    floats: int,
    least_floats: int | None,
) -> Ledger:
    """The ledger with hidden INT8 linears proved, where the kernels' numbers leave no other choice.

    integer, floats: matrix products that an execution launches (`kernels.py`); least_floats: what
    it cannot do without in floating point (`least_float_products`), None where that is not known.
    TensorRT may merge linears of one input (q, k and v) into one product. So with M linears on D
    inputs all run in INT8 if there are D … M integer products and no more float ones than the rest
    of the network needs: a linear that fell back would be one more. Also if there are M integer
    ones, since nothing else makes such a product. Anything else proves nothing, nor do linears of
    which some are shown by layers: their products are among those counted.
    """
    asked = [row for row in ledger.rows if row.requested == "INT8"]
    hidden = [row for row in asked if row.executed == HIDDEN]
    inputs = {str(linears[row.linear].get(INPUT, row.linear)) for row in hidden}
    only = floats == least_floats and len(inputs) <= integer <= len(hidden)
    if not hidden or len(hidden) < len(asked) or not (only or integer == len(hidden)):
        return ledger
    words = f"{integer} integer kernels launched for {len(hidden)} linears"
    return Ledger(
        tuple(
            replace(
                row, executed=BY_KERNELS, layer=f"{words}, in {row.layer}".removesuffix(", in ")
            )
            if row.requested == "INT8"
            else row
            for row in ledger.rows
        )
    )


def layers_of(inspector_json: str) -> list[dict[str, Any]]:
    """The layers of `EngineInspector.get_engine_information(JSON)`. Raises `ArtifactError`."""
    try:
        found = json.loads(inspector_json)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"the engine inspector's answer is not readable: {error}") from error
    if not all(isinstance(layer, dict) for layer in found):
        raise ArtifactError(
            "the engine was built without detailed profiling verbosity, so its layers have names "
            "only; build it with qdit"
        )
    return list(found)


def _is_region(layer: Mapping[str, Any]) -> bool:
    """Whether a layer stands for a part of the network that the inspector shows nothing of."""
    return layer.get("LayerType") == "Myelin" or str(layer.get("Name", "")).startswith(_REGION)


def _region_of(linear: str, regions: Sequence[Mapping[str, Any]]) -> str:
    """The region that must hold a linear which no layer shows; '' where that cannot be known.

    It is the one that names the linear, or the only one that there is. The other regions' names
    tell their first and last nodes alone, and what lies between these is not theirs for certain.
    """
    named = _naming(linear, regions) or regions
    return str(named[0].get("Name", "")) if len(named) == 1 else ""


def _naming(linear: str, layers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    pattern = _mentions(linear)
    return [layer for layer in layers if pattern.search(_words(layer))]


def _mentions(linear: str) -> re.Pattern[str]:
    """The product's node in a layer's name or metadata, not another linear that starts alike."""
    name = re.escape(linear)
    return re.compile(rf"(?<![\w./]){name}(?:/product|\.output|(?![\w./]))")


def _words(layer: Mapping[str, Any]) -> str:
    name = str(layer.get("Name", "")).replace("...", " ")  # between a region's first and last node
    return f"{name} {layer.get('Metadata', '')}"


def _precision_of(layer: Mapping[str, Any], requested: str) -> str:
    """What a layer computes in: by its tactic where that names INT8 matrix units, else by the
    format of what it reads. A plugin is what it is."""
    if "plugin" in str(layer.get("LayerType", "")).lower():
        return "PLUGIN"
    tactic = str(layer.get("TacticName", "")).lower()
    if re.search(r"i8816|i16832|i8i8|int8|imma|_i8", tactic):
        return "INT8"
    inputs = layer.get("Inputs") or []
    texts = [_format_of(entry) for entry in inputs]
    weights = str((layer.get("Weights") or {}).get("Type", "")).lower()
    words = [*texts, weights] if requested == "INT4" else texts
    for name, patterns in _FORMATS:
        if any(pattern in text for text in words for pattern in patterns):
            return name
    return NOT_FOUND


def _format_of(entry: Mapping[str, Any]) -> str:
    """'row major int8 format' by 8.6 and 10, or the data type by itself."""
    return str(entry.get("Format/Datatype", entry.get("Datatype", ""))).lower()
