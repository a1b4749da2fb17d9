"""INT8 against FP16 engines of one TensorRT: build time, accuracy, ledger and speed, in one run.

    python benchmarks/tensorrt_engines.py make build/trt-kit --tensorrt-version 8.6
    python benchmarks/tensorrt_engines.py run build/trt-kit --json build/trt-8.6.json

`make` needs PyTorch and no GPU: for the demo and for the first blocks of DiT-XL/2 (random weights)
it writes the `tensorrt-int8` file (w8a8, static scales calibrated over the timesteps), the
unquantized file, and inputs with what ONNX Runtime makes of either file. `run` needs TensorRT and a
GPU, and of Python packages numpy, rich, onnx, polygraphy and cuda-bindings alone, so that it runs
beside a TensorRT 8.6, whose wheel is for Python 3.10 (numpy < 2: its bindings read arrays of
NumPy 2 as zeros). Engines are built by the project's own code, each with a timing cache of its own;
a quantized linear that falls back ends the run, one that the inspector does not name is counted.
Engines are timed in turns by CUDA events.

Each engine's layers (name, type, tactic, formats) by TensorRT's inspector, and the kernels that one
execution launches by the CUDA driver (`engines/tensorrt/kernels.py`), go into the JSON: 8.6 hides
the products in regions of Myelin, and only the kernels' names tell what runs there. `--verbose`
keeps TensorRT's own log beside each engine. `profile` opens the engines that `run` built and
executes them between cudaProfilerStart and cudaProfilerStop, for NVIDIA's profilers (times and
instructions by kernel; `ncu --query-metrics | grep -i imma` lists the counters of INT8 products
that a GPU has):

    ncu --profile-from-start off --print-summary per-kernel --metrics gpu__time_duration.sum \
        python3.10 benchmarks/tensorrt_engines.py profile KIT --models demo --batch 16
    nsys profile --capture-range cudaProfilerApi --stats true -o build/trt \
        python3.10 benchmarks/tensorrt_engines.py profile KIT --models demo --batch 16

Other ways to build (`tensorrt_variants.py`), one or more at a time, each in a folder of its own:
`--surroundings free` leaves it to TensorRT what runs around INT8 products, `attention` has
attention in FP16 and the timestep in FP32; `--no-dynamic-shapes`, `--conv`,
`--precision-constraints obey`, `--no-fp16`, `--level 1` … `5` were to find INT8 kernels outside
Myelin. `--kinds tensorrt-int8` leaves the FP16 engine out.

TensorRT 8.6 without cuBLAS and cuDNN (nothing uses them, `libnvinfer_plugin.so.8` binds them):

    python benchmarks/tensorrt_engines.py stand-ins path/to/libnvinfer_plugin.so.8 build/stand-ins
    LD_LIBRARY_PATH=build/stand-ins:$LD_LIBRARY_PATH python3.10 benchmarks/tensorrt_engines.py run …
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tensorrt_kit import KINDS, MODELS, kit_models, make_kit
from tensorrt_stand_ins import make_stand_ins
from tensorrt_variants import CONSTRAINTS, Variant, altered, write_convolutions

from qdit.engines.tensorrt.kernels import float_products, integer_products
from qdit.engines.tensorrt.settings import SURROUNDINGS
from qdit.errors import QditError
from qdit.files import write_json
from qdit.progress import Progress, Terminal


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("make", help="write the files")
    make.add_argument("folder", type=Path)
    make.add_argument("--tensorrt-version", default="8.6")
    make.add_argument("--models", default=",".join(MODELS))
    make.add_argument("--blocks", type=int, default=4, help="of models that are not the demo")
    make.add_argument("--compare", type=int, default=5, help="samples, over the timesteps")
    run = verbs.add_parser("run", help="build the engines, compare and time them")
    _add_choice(run)
    run.add_argument("--batch", type=_batches, default="2,16,64")
    run.add_argument("--repeats", type=int, default=5)
    run.add_argument("--runs", type=int, default=20)
    run.add_argument("--json", type=Path)
    run.add_argument("--verbose", action="store_true", help="keep TensorRT's log as KIND.log")
    run.add_argument("--allow-fallback", action="store_true", help="build what falls back as well")
    profile = verbs.add_parser("profile", help="execute what `run` built, under a profiler")
    _add_choice(profile)
    profile.add_argument("--batch", type=_batches, default="16", help="one or more")
    profile.add_argument("--runs", type=int, default=3)
    stand_ins = verbs.add_parser("stand-ins", help="libraries that export what 8.6 binds")
    stand_ins.add_argument("library", type=Path)
    stand_ins.add_argument("folder", type=Path)
    return parser.parse_args()


def _add_choice(parser: argparse.ArgumentParser) -> None:
    """Which of a kit's models and files, and which way to build them."""
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", help="sources, as in `make`; by default all of the kit")
    parser.add_argument("--kinds", type=_kinds, default=",".join(KINDS))
    parser.add_argument("--level", type=int, help="builder optimization level")
    parser.add_argument("--no-fp16", dest="fp16", action="store_false", help="floats in FP32")
    parser.add_argument("--precision-constraints", choices=CONSTRAINTS, default="prefer")
    parser.add_argument(
        "--no-dynamic-shapes",
        dest="dynamic_shapes",
        action="store_false",
        help="FASTER_DYNAMIC_SHAPES_0805 off",
    )
    parser.add_argument("--conv", action="store_true", help="quantized linears as 1x1 Conv")
    parser.add_argument(
        "--surroundings",
        choices=SURROUNDINGS,
        help="what runs around INT8 products; by default the product's choice",
    )


def _kinds(text: str) -> list[str]:
    """'tensorrt-int8' or more than one; argparse says what is wrong with anything else."""
    wanted = text.split(",")
    if unknown := set(wanted) - set(KINDS):
        raise argparse.ArgumentTypeError(f"{min(unknown)} is none of {', '.join(KINDS)}")
    return [kind for kind in KINDS if kind in wanted]


def _variant(arguments: argparse.Namespace) -> Variant:
    """Raises `InputError` where the installed TensorRT has no such way to build."""
    from qdit.engines.tensorrt.library import installed_features

    found = Variant(
        arguments.level,
        arguments.fp16,
        arguments.precision_constraints,
        arguments.dynamic_shapes,
        arguments.conv,
        arguments.surroundings,
    )
    found.check(installed_features().strongly_typed)
    return found


def _batches(text: str) -> list[int]:
    """'2,16,64' in ascending order; argparse says what is wrong with anything else."""
    sizes = sorted(int(size) for size in text.split(","))
    if sizes[0] < 1:
        raise argparse.ArgumentTypeError(f"batch sizes must be at least 1, got {text}")
    return sizes


def main() -> None:
    arguments = parse()
    try:
        with Terminal() as progress:
            if arguments.verb == "make":
                make_kit(arguments, progress)
            elif arguments.verb == "run":
                run_kit(arguments, progress)
            elif arguments.verb == "profile":
                profile_kit(arguments, progress)
            else:
                make_stand_ins(arguments.library, arguments.folder)
    except QditError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error


@dataclass
class Measured:
    """One engine. error: relative, against ONNX Runtime on the same file; own_error: ONNX Runtime
    against itself without optimizations; errors: the first by timestep; times in ms a call;
    layers: by TensorRT's inspector; kernels: launches by name, by the driver, at the middle batch,
    or 'error' with the reason why there are none."""

    kind: str
    build_seconds: float
    engine_bytes: int
    ledger: dict[str, int]
    fallbacks: int
    unproved: int
    error: float
    own_error: float
    errors: dict[int, float]
    milliseconds: dict[int, list[float]]
    layers: list[dict[str, Any]]
    kernels: dict[str, Any]


def run_kit(arguments: argparse.Namespace, progress: Progress) -> None:
    from qdit.engines.tensorrt.library import gpu_identity, installed_version

    variant = _variant(arguments)
    results = []
    for folder, facts in kit_models(arguments):
        progress.say(f"{facts['source']}: TensorRT {installed_version()}, {variant.label}")
        measured = run_model(folder, variant, arguments, progress)
        results.append(facts | {"engines": [vars(engine) for engine in measured]})
        _print(facts, measured, progress)
        if arguments.json:  # after each model: what was measured outlives the next one's failure
            write_json(
                arguments.json,
                {
                    "tensorrt": str(installed_version()),
                    "gpu": gpu_identity().to_json(),
                    "level": arguments.level,
                    "variant": vars(variant),
                    "models": results,
                },
            )


def run_model(
    folder: Path, variant: Variant, arguments: argparse.Namespace, progress: Progress
) -> list[Measured]:
    """A model's engines, built anew and timed in turns."""
    from qdit.engines.tensorrt.settings import BatchProfile, BuildSettings

    batches = arguments.batch
    middle = batches[len(batches) // 2]
    inputs, made, engines = dict(np.load(folder / "inputs.npz")), [], []
    most = max(batches[-1], len(inputs["timestep"]))
    settings = BuildSettings(
        BatchProfile(1, middle, most),
        variant.level,
        allow_fallback=arguments.allow_fallback,
        surroundings=variant.around,
    )
    for kind in arguments.kinds:
        stored = _build(folder, kind, variant, settings, arguments.verbose, progress)
        engine = stored.open()
        reference = dict(np.load(folder / f"{kind}.reference.npz"))
        noise, expected = engine.infer(inputs)["sample"], reference["sample"]
        ledger: dict[str, int] = defaultdict(int)
        for row in stored.ledger.rows:
            ledger[f"{row.requested} as {row.executed}"] += 1
        manifest = stored.manifest
        made.append(
            Measured(
                kind,
                manifest.build_seconds,
                manifest.engine_bytes,
                dict(ledger),
                len(stored.ledger.fallbacks),
                len(stored.ledger.unproved),
                _relative(noise, expected),
                _relative(reference["plain"], expected),
                {
                    int(step): _relative(one, other)
                    for step, one, other in zip(inputs["timestep"], noise, expected, strict=True)
                },
                defaultdict(list),
                [_brief(layer) for layer in engine.layers()],
                _kernels(engine, _at(inputs, middle)),
            )
        )
        engines.append(engine)
    for batch in batches:
        given = _at(inputs, batch)
        for _ in range(arguments.repeats):
            for measured, engine in zip(made, engines, strict=True):
                times = engine.time_batches(given, arguments.runs)
                measured.milliseconds[batch].append(statistics.median(times))
    for engine in engines:
        engine.close()
    return made


def _at(inputs: dict[str, np.ndarray], batch: int) -> dict[str, np.ndarray]:
    """The samples, repeated to a batch size."""
    return {name: np.resize(array, (batch, *array.shape[1:])) for name, array in inputs.items()}


def _build(
    folder: Path, kind: str, variant: Variant, settings: Any, verbose: bool, progress: Progress
) -> Any:
    """The `StoredEngine` of a variant, from a copy of the kit's file in the variant's folder."""
    from qdit.engines.tensorrt.library import installed_features
    from qdit.engines.tensorrt.linears import linears_of
    from qdit.engines.tensorrt.store import TIMING_CACHE, engine_path, forget_engine, stored_engine

    source, place = folder / f"{kind}.onnx", folder / variant.label
    place.mkdir(exist_ok=True)
    path = place / source.name
    forget_engine(engine_path(path))
    # or int8 would be built with fp16's timings
    (place / TIMING_CACHE).unlink(missing_ok=True)
    quantized = {
        name for name, entry in linears_of(source).items() if entry.get("precision") == "INT8"
    }
    for file in folder.glob(f"{source.name}*"):  # with its external data
        shutil.copy(file, place)
    if variant.convolutions and quantized:
        write_convolutions(path, path, quantized)
    log = path.with_suffix(".log") if verbose else None
    with _tensorrt_log(log), altered(variant, quantized):
        return stored_engine(path, settings, installed_features(), progress)


@contextmanager
def _tensorrt_log(path: Path | None) -> Iterator[None]:
    """Keep all that TensorRT says in a file, and nothing of it on the terminal."""
    if path is None:
        yield
        return
    log = logging.getLogger("qdit.tensorrt")
    before = log.level, log.propagate
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(relativeCreated)d ms %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
        log.setLevel(before[0])
        log.propagate = before[1]


def _brief(layer: dict[str, Any]) -> dict[str, Any]:
    """What tells of a layer's precision. The whole answer lies in KIND.layers.json."""
    formats = {
        side: [entry.get("Format/Datatype", entry.get("Datatype", "")) for entry in layer[side]]
        for side in ("Inputs", "Outputs")
        if layer.get(side)
    }
    tactic = {"tactic": layer["TacticName"]} if layer.get("TacticName") else {}
    return {"name": layer.get("Name", ""), "type": layer.get("LayerType", ""), **tactic, **formats}


def _kernels(engine: Any, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """See `Measured.kernels`. Evidence beside the figures: a fault here must not cost them."""
    try:
        return dict(engine.kernels(inputs))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def profile_kit(arguments: argparse.Namespace, progress: Progress) -> None:
    """Execute the engines of a variant, launch by launch, where a profiler looks."""
    from qdit.engines.tensorrt.cuda import checked, cuda_runtime
    from qdit.engines.tensorrt.engine import TensorRtEngine
    from qdit.engines.tensorrt.store import checked_engine

    runtime, variant = cuda_runtime(), _variant(arguments)
    for folder, facts in kit_models(arguments):
        inputs = dict(np.load(folder / "inputs.npz"))
        for kind in arguments.kinds:
            path = folder / variant.label / f"{kind}.engine"
            checked_engine(path)
            with TensorRtEngine(path, graphs=False) as engine:
                for batch in arguments.batch:
                    engine.infer(_at(inputs, batch))
                    progress.say(f"{facts['source']} {kind} {variant.label}: batch {batch}")
                    checked(runtime, runtime.cudaProfilerStart())
                    for _ in range(arguments.runs):
                        engine.run()
                    checked(runtime, runtime.cudaProfilerStop())


def _relative(got: np.ndarray, expected: np.ndarray) -> float:
    wide = expected.astype(np.float64)
    return float(np.linalg.norm(got.astype(np.float64) - wide) / np.linalg.norm(wide))


def _print(facts: dict[str, Any], made: list[Measured], progress: Progress) -> None:
    for engine in made:
        ledger = ", ".join(f"{count} {name}" for name, count in sorted(engine.ledger.items()))
        progress.say(
            f"{facts['source']} {engine.kind}: built in {engine.build_seconds:.0f} s, "
            f"{engine.engine_bytes / 1e6:.1f} MB; {engine.error:.2g} from ONNX Runtime "
            f"({engine.own_error:.2g} from itself without optimizations); {ledger}; "
            f"{_kernel_words(engine.kernels)}"
        )
    if len(made) < len(KINDS):
        for engine in made:
            each = (f"{batch}: {statistics.median(t):.3f} ms"
                    for batch, t in engine.milliseconds.items())  # fmt: skip
            progress.say(f"  batch {', '.join(each)}")
        return
    half, quantized = made
    for batch, times in half.milliseconds.items():
        one, other = statistics.median(times), statistics.median(quantized.milliseconds[batch])
        progress.say(
            f"  batch {batch}: fp16 {one:.3f} ms, int8 {other:.3f} ms, {one / other:.2f} × as fast"
        )


def _kernel_words(kernels: dict[str, Any]) -> str:
    if "error" in kernels:
        return f"kernels unknown ({kernels['error']})"
    return (
        f"{sum(kernels.values())} launches, {integer_products(kernels)} of them INT8 products and "
        f"{float_products(kernels)} float ones by name"
    )


if __name__ == "__main__":
    main()
