"""report.json as pydantic models: the written record of one export and its proof (docs/report.md).

Unknown keys are refused on reading, and no NaN or infinity is ever written: a figure that is not
finite is null, and the gate says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue, ValidationError

from ...errors import ArtifactError, InputError
from ...files import write_json
from .entry import Entry, first_problem
from .search_schema import SearchEntry
from .targets_schema import TargetEntry

SCHEMA_VERSION: Literal[2] = 2
NAME = "report.json"

Error = float | None  # a relative error; null when it is not finite


class SourceEntry(Entry):
    """Where the full-precision model came from."""

    kind: str
    location: str
    sha256: str
    seed: int | None


class ModelEntry(Entry):
    """The model. `sample_shape` is [C, H, W] of one noise sample."""

    name: str
    family: str
    parameters: int = Field(ge=0)
    sample_shape: tuple[int, ...]
    classes: int = Field(ge=0)
    source: SourceEntry


class LayerEntry(Entry):
    """One linear: weight [out_features, in_features], its scheme, bytes and errors.

    `bytes` counts integers, scales, multipliers and zero points. `weight_error` and `output_error`
    come from calibration: ‖W − Ŵ‖ / ‖W‖ and ‖(W − Ŵ)X‖ / ‖WX‖; the `float_scales_…` ones are what
    float scales of the same groups would have given. Null where calibration did not measure them.
    """

    name: str
    role: str
    block: int
    in_features: int
    out_features: int
    weight_bits: int
    activation_bits: int
    weight_group: int | str
    activation_group: int | str
    weight_symmetric: bool
    activation_symmetric: bool
    scale_dtype: str
    scale_format: str = "float"
    scheme: str
    bytes: int
    weight_error: Error = None
    output_error: Error = None
    float_scales_weight_error: Error = None
    float_scales_output_error: Error = None


class PlanEntry(Entry):
    """The plan. `effective_weight_bits` is over the linears it quantizes, scales included."""

    bits: str
    effective_weight_bits: float
    weights: str
    layers: tuple[LayerEntry, ...]


class IntegerScalesEntry(Entry):
    """The `linears` with integer scales beside themselves with float scales of the same groups.

    Errors are root mean squares over these linears of what `LayerEntry` has; null where
    calibration measured none. Bits are the effective ones over these linears.
    """

    linears: int = Field(ge=1)
    effective_weight_bits: float
    float_scales_effective_weight_bits: float
    weight_error: Error
    float_scales_weight_error: Error
    output_error: Error
    float_scales_output_error: Error


class FileEntry(Entry):
    """A file of the export, by its path in the output folder."""

    name: str
    bytes: int
    sha256: str


class SizeParts(Entry):
    """What `quantized_bytes` is made of."""

    integers_bytes: int
    scales_and_zero_points_bytes: int
    untouched_parameters_bytes: int


class SizesEntry(Entry):
    """Sizes. `full_precision_fp16_bytes`: all parameters in float16, shared ones once;
    `quantized_bytes`: the checkpoint folder's two files."""

    full_precision_fp16_bytes: int
    full_precision_fp16_linears_bytes: int
    quantized_bytes: int
    parts: SizeParts
    files: tuple[FileEntry, ...]


class SamplingEntry(Entry):
    """How the compared images were made. `scheduler` is null for the model's own."""

    num_inference_steps: int
    guidance_scale: float
    seed: int
    scheduler: str | None


class WorstEntry(Entry):
    """The coordinate of the largest difference, both values, and the tolerance it needs."""

    where: tuple[int, ...]
    expected: Error
    got: Error
    needed_tolerance: Error


class ComparisonEntry(Entry):
    """A relative error ‖got − expected‖ / ‖expected‖ and where it is largest."""

    relative_error: Error
    elements: int
    worst: WorstEntry | None


class BoundEntry(Entry):
    """The engine's distance from the simulation in units of the simulation's own.

    `own_relative_error` is the distance between the simulation in the two `own_dtypes`.
    """

    ratio: Error
    limit: float
    own_relative_error: Error
    own_dtypes: tuple[str, str]
    inputs: int


class EngineComparisonEntry(ComparisonEntry):
    """The engine against the simulation, with the bound it was held to."""

    bound: BoundEntry


class LinearEntry(Entry):
    """One quantized linear in the engine and in simulation, fed the same input."""

    name: str
    relative_error: Error
    bound: float
    worst: WorstEntry | None


class PairEntry(Entry):
    """Relative errors of both steps on the way from full precision to the exported file."""

    simulation_vs_full_precision: Error
    engine_vs_simulation: Error


class BlockEntry(PairEntry):
    """At one block's output."""

    block: int


class TimestepEntry(PairEntry):
    """In the predicted noise at one timestep."""

    timestep: int


class ImagesEntry(Entry):
    """Image pairs from the same noise. PSNR in dB with peak 2; null where infinite or undefined.

    `engine` is what made the quantized images: the one that was proven, or 'simulation'.
    """

    engine: str
    samples: int
    psnr_db: float | None
    psnr_db_min: float | None
    psnr_db_median: float | None
    worst_image: int | None
    mean_squared_error: float | None
    identical: bool
    not_finite: int


class FidEntry(Entry):
    """FID of both models over the same noise; `difference` = quantized − full precision."""

    full_precision: float
    quantized: float
    difference: float
    difference_ci95: tuple[float, float]
    samples: int
    max_increase: float
    features: str
    reference: str
    dimensions: int
    resamples: int
    full_resamples: int
    bias: float
    method: str


class CheckEntry(Entry):
    """One check of the gate. `value` must be at most `limit`."""

    name: str
    outcome: Literal["passed", "failed", "not run"]
    value: float | None
    limit: float | None
    why: str


class ParityEntry(Entry):
    """All paired figures, and the gate's verdict on them.

    `engine` is the one that was proven, 'onnxruntime', 'torch' or 'tensorrt'. `images_compared` and
    `steps_compared` say on how many inputs the denoisers were compared. `engine_vs_file`: the
    engine against its own file in ONNX Runtime, null where its linears were compared instead;
    `file_own_relative_error`: ONNX Runtime against itself without optimizations.
    """

    passed: bool
    complete: bool
    reason: str
    checks: tuple[CheckEntry, ...]
    dtype: str
    images_compared: int
    steps_compared: int
    simulation_vs_full_precision: ComparisonEntry
    engine: str
    engine_vs_simulation: EngineComparisonEntry
    engine_vs_file: ComparisonEntry | None = None
    file_own_relative_error: Error = None
    linears: tuple[LinearEntry, ...]
    blocks: tuple[BlockEntry, ...]
    timesteps: tuple[TimestepEntry, ...]
    images: ImagesEntry | None
    fid: FidEntry | None
    fid_not_run: str | None


class Report(Entry):
    """The whole of report.json. `timings_s` is by step of the job, in seconds.

    `search` is null where the plan was given and not searched for, `integer_scales` where no linear
    has any; `targets` holds the files of other runtimes, and their engines.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    created: str
    command: str
    model: ModelEntry
    plan: PlanEntry
    sizes: SizesEntry
    sampling: SamplingEntry
    parity: ParityEntry
    timings_s: dict[str, float]
    machine: dict[str, JsonValue]
    versions: dict[str, str]
    warnings: tuple[str, ...] = ()
    search: SearchEntry | None = None
    targets: tuple[TargetEntry, ...] = ()
    integer_scales: IntegerScalesEntry | None = None

    def write(self, path: Path) -> None:
        """Write canonical JSON, atomically."""
        write_json(path, self.model_dump(mode="json"))


def read_report(path: Path) -> Report:
    """Read a report.json. Raises `InputError` when missing, `ArtifactError` when malformed."""
    try:
        return Report.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"no report at {path}; run qdit-export or qdit-validate first") from error
    except ValidationError as error:
        raise ArtifactError(
            f"{path} is not a report of schema version {SCHEMA_VERSION}: {first_problem(error)}; "
            "export the model again"
        ) from error
