"""The proof: parity at every boundary, images in pairs, FID, the gate, and the report of it all."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..calibrate.checkpoint import QuantizedCheckpoint
from ..calibrate.families.base import Denoiser
from ..calibrate.fid import FidDifference, fid_difference
from ..calibrate.model import DiffusionModel
from ..files import sha256_of_file, write_json
from ..onnx_places import QDQ_FILE
from ..progress import Progress
from .engine import ENGINE_TITLES
from .estimate import choose_fid_samples, measure_forward
from .fid_files import FidFiles, load_fid_files
from .full_precision import FullPrecision
from .gate import Gate, Limits, judge
from .machine import describe_machine
from .options import ProofOptions
from .paired_images import PairedImages, read_pairs, sample_pairs
from .parity import DenoiserParity, measure_parity
from .parity_images import image_parity
from .parity_inputs import record_trajectories
from .proof_engine import ProofEngine
from .report.build import Proof, build_report
from .report.search_schema import SearchEntry
from .report.targets_schema import TargetEntry, files_of
from .report.write import write_report
from .workspace import Workspace

_MOST_PARITY_IMAGES = 2
_PARITY_SECONDS = 20.0
_SPEED_FILE = "speed.json"


@dataclass(frozen=True)
class ProofJob:
    """What the steps of a proof share: `full` precision, and the `engine` that it became.

    `search` is how the plan was found, None where it was given; `targets` are the files of other
    runtimes that lie beside, and `warnings` what was decided on the way: all for the report.
    """

    full: FullPrecision
    checkpoint: QuantizedCheckpoint
    engine: ProofEngine
    options: ProofOptions
    workspace: Workspace
    batch_size: int
    progress: Progress
    search: SearchEntry | None = None
    targets: tuple[TargetEntry, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def model(self) -> DiffusionModel:
        """Full precision; its weights are away between parity and images (`FullPrecision`)."""
        return self.full.model


def prove_and_report(job: ProofJob, command: str) -> bool:
    """Measure, judge, write report.json, report.html and samples.png; True when the gate passed."""
    fid_files = load_fid_files(job.options, job.model)
    seconds = measured_speed(job)
    with job.workspace.timed("parity"):
        parity = _parity(job, seconds)
    images, no_images = _images(job, fid_files, seconds)
    figures = None if images is None else image_parity(images.squared_error.numpy())
    no_fid = no_images if images is None else fid_files.missing
    fid = None
    if figures is not None and figures.not_finite:
        no_fid = "images hold NaN or infinity"
    else:
        with job.workspace.timed("fid"):
            fid = _fid(images, fid_files, job)
    limits = Limits(job.options.max_fid_increase)
    gate = judge(
        parity,
        figures,
        fid,
        limits,
        no_images=no_images,
        no_fid=no_fid,
    )
    proof = Proof(
        parity,
        figures,
        fid,
        limits,
        gate,
        engine=job.engine.name,
        images_engine=_image_engine(job),
        features=_name(fid_files.features_path),
        reference=_name(fid_files.reference_path),
    )
    _write(job, proof, images, command)
    _say(job, proof)
    return gate.passed


def measured_speed(job: ProofJob) -> float:
    """Seconds a sample of one full-precision forward; measured once for an output folder.

    The automatic number of images depends on it, so a resumed run must not measure another.
    """
    inputs = {"model": asdict(job.model.source), "device": str(job.model.device)}

    def work(folder: Path) -> None:
        seconds = measure_forward(job.model, min(job.batch_size, 8))
        write_json(folder / _SPEED_FILE, {"seconds_per_sample": seconds})

    folder = job.workspace.run("speed", inputs, work)
    return float(json.loads((folder / _SPEED_FILE).read_text())["seconds_per_sample"])


def _parity(job: ProofJob, seconds: float) -> DenoiserParity:
    affordable = int(_PARITY_SECONDS / (seconds * job.options.num_inference_steps))
    images = max(1, min(_MOST_PARITY_IMAGES, affordable))
    steps = record_trajectories(job.model, job.options.sampling(), images, progress=job.progress)
    return measure_parity(
        job.model,
        job.checkpoint,
        job.engine,
        steps,
        after_full_precision=job.full.put_away,
        progress=job.progress,
    )


def _images(job: ProofJob, fid_files: FidFiles, seconds: float) -> tuple[PairedImages | None, str]:
    """The pairs, or None and the reason why there are none."""
    count = choose_fid_samples(job.options, seconds, job.model.device.type)
    if count == 0:
        return None, "--fid-samples is 0"
    if not _decodable(job.model):
        return None, "the model makes latents and came without a VAE to decode them"
    inputs = {
        "model": asdict(job.model.source),
        "weights": job.checkpoint.manifest.weights.sha256,
        "sampling": asdict(job.options.sampling()),
        "count": count,
        "batch": job.batch_size,
        "engine": _image_engine(job),
        **job.engine.identity(),
        "features": _digest(fid_files.features_path),
    }

    def sample(folder: Path) -> None:
        job.full.bring_back()
        sample_pairs(
            job.model,
            job.model.as_denoiser(),
            _quantized_denoiser(job),
            job.options.sampling(),
            count,
            batch_size=job.batch_size,
            extractor=fid_files.extractor,
            folder=folder,
            progress=job.progress,
        )

    folder = job.workspace.run("images", inputs, sample)
    return read_pairs(folder, count, job.batch_size), ""


def _decodable(model: DiffusionModel) -> bool:
    return model.vae is not None or model.sample_shape[0] == 3


def _image_engine(job: ProofJob) -> str:
    """The engine makes the images; on a GPU the simulation does for one that runs on the CPU."""
    alone = job.model.device.type == "cpu" or job.engine.on_gpu
    return job.engine.name if alone else "simulation"


def _quantized_denoiser(job: ProofJob) -> Denoiser:
    if _image_engine(job) == "simulation":
        simulation = job.checkpoint.build_denoiser(job.model.device)
        return job.model.as_denoiser(simulation)
    return job.engine.open().as_denoiser(job.model.family, job.model.config)


def _fid(images: PairedImages | None, files: FidFiles, job: ProofJob) -> FidDifference | None:
    if images is None or images.features_full is None or images.features_quantized is None:
        return None
    if files.reference is None:
        return None
    return fid_difference(
        images.features_full.numpy(),
        images.features_quantized.numpy(),
        files.reference,
        seed=job.options.seed,
        progress=job.progress,
    )


def _write(job: ProofJob, proof: Proof, images: PairedImages | None, command: str) -> None:
    output = job.workspace.output
    names = ["qdit.json", "weights.safetensors", QDQ_FILE, f"{QDQ_FILE}.data"]
    names += [name for target in job.targets for name in files_of(target)]
    files = [output / name for name in names if (output / name).is_file()]
    report = build_report(
        job.model,
        job.checkpoint,
        proof,
        job.options.sampling(),
        command=command,
        timings=job.workspace.timings,
        machine=describe_machine(),
        output=output,
        files=files,
        warnings=job.warnings,
        search=job.search,
        targets=job.targets,
    )
    full, quantized, captions = None, None, []
    if images is not None:
        full, quantized = images.full, images.quantized
        captions = _captions(job.model, len(full))
    for path in write_report(report, output, full, quantized, captions):
        job.progress.say(f"wrote {path}")


def _captions(model: DiffusionModel, count: int) -> list[str]:
    classes = model.family.class_count(model.denoiser)
    named = len(model.class_names) == classes
    return [
        model.class_names[i % classes] if named else f"class {i % classes}" for i in range(count)
    ]


def _say(job: ProofJob, proof: Proof) -> None:
    say, title = job.progress.say, ENGINE_TITLES[job.engine.name]
    say(
        f"parity: simulation {proof.parity.simulation.relative_error:.3g} from full precision; "
        f"{title} {proof.parity.engine.relative_error:.2g} from the simulation"
    )
    if proof.images is not None:
        psnr = "identical" if proof.images.psnr_db is None else f"{proof.images.psnr_db:.2f} dB"
        say(f"images: PSNR {psnr} over {proof.images.samples} pairs ({proof.images_engine})")
    if proof.fid is not None:
        low, high = proof.fid.ci95
        say(
            f"FID over {proof.fid.samples} pairs: {proof.fid.full_precision:.3f} → "
            f"{proof.fid.quantized:.3f} (difference {proof.fid.difference:+.3f}, "
            f"95 % interval {low:+.3f} … {high:+.3f})"
        )
    say(f"{_verdict(proof.gate)}: {proof.gate.reason}")


def _verdict(gate: Gate) -> str:
    if not gate.passed:
        return "FAILED"
    return "passed" if gate.complete else "passed, with checks not run"


def _name(path: Path | None) -> str:
    return "" if path is None else path.name


def _digest(path: Path | None) -> str:
    return "" if path is None else sha256_of_file(path)
