"""FID of a DiT folder under DDIM sampling, for several step counts and guidance scales.

recipes/README.md shows the command lines.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from demo_recipe.card import device_name, update_card, versions
from demo_recipe.cli import pick_device
from demo_recipe.errors import RecipeError, exit_on_recipe_error
from demo_recipe.features import FeatureModel
from demo_recipe.fid import Statistics, frechet_distance, load_statistics, statistics_of
from demo_recipe.files import write_json
from demo_recipe.images import load_folder
from demo_recipe.sampling import Sampler, batches_of, draw_noise
from rich.console import Console
from rich.table import Table

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Evaluation:
    """What every sampling setting is measured with."""

    sampler: Sampler
    features: FeatureModel
    reference: Statistics
    noise: torch.Tensor
    batch_size: int

    def measure(self, steps: int, guidance: float) -> dict[str, Any]:
        """One row of the report; the CPU extracts features while the GPU samples on."""
        start = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            jobs = [
                pool.submit(self.features, self.sampler.sample(noise, labels, steps, guidance))
                for noise, labels in batches_of(self.noise, self.batch_size)
            ]
            found = np.concatenate([job.result() for job in jobs])
        return {
            "steps": steps,
            "guidance": guidance,
            "fid": frechet_distance(statistics_of(found), self.reference),
            "seconds": time.monotonic() - start,
        }

    def measure_real(self, folder: Path) -> dict[str, Any]:
        """FID of the images in ``folder`` (one folder a class): the floor of the figures."""
        real = load_folder(folder)
        fid = frechet_distance(statistics_of(self.features(real.images)), self.reference)
        return {"images": len(real), "fid": fid}


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="Folder with transformer/ and scheduler/.")],
    features: Annotated[Path, typer.Option(help="The extractor, features.onnx.")],
    reference: Annotated[Path, typer.Option(help="Statistics of the training images, .npz.")],
    images: Annotated[int, typer.Option(help="Images a setting.")] = 10_000,
    steps: Annotated[str, typer.Option(help="DDIM step counts, comma separated.")] = "20,50",
    guidance: Annotated[str, typer.Option(help="Guidance scales, comma separated.")] = "1.0,1.5",
    batch_size: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 2000,
    real: Annotated[Path | None, typer.Option(help="Test images, one folder a class.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Report to write.")] = None,
    update_model_card: Annotated[
        bool, typer.Option("--update-card", help="Put the table into the model's README.md.")
    ] = False,
    bf16: Annotated[bool, typer.Option(help="Run the DiT in bf16 autocast.")] = True,
    compile_model: Annotated[
        bool, typer.Option("--compile/--no-compile", help="torch.compile the DiT.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Measure the FID of MODEL for every step count with every guidance scale."""
    with exit_on_recipe_error():
        settings = [
            (count, scale)
            for count in _numbers(steps, int, "--steps", 1, 1000)
            for scale in _numbers(guidance, float, "--guidance", 0.0, 100.0)
        ]
        if images < 2:
            raise RecipeError(f"--images must be at least 2 for a covariance, got {images}")
        place = pick_device(device)
        evaluation = Evaluation(
            sampler=Sampler(model, place, bf16, compile_model),
            features=FeatureModel(features),
            reference=load_statistics(reference),
            noise=draw_noise(images, seed),
            batch_size=batch_size,
        )
        report = {
            "model": str(model),
            "images": images,
            "seed": seed,
            "precision": "bf16 autocast" if bf16 else "fp32",
            "device": device_name(place),
            "versions": versions(),
            "rows": _measure_all(evaluation, settings),
            "real": None if real is None else evaluation.measure_real(real),
        }
        if json_file is not None:
            write_json(json_file, report)
        if update_model_card:
            update_card(model, report)
        _print(report)


def _measure_all(evaluation: Evaluation, settings: list[tuple[int, float]]) -> list[dict[str, Any]]:
    rows = []
    for steps, guidance in settings:
        row = evaluation.measure(steps, guidance)
        typer.echo(
            f"{steps} steps, guidance {guidance}: FID {row['fid']:.3f} ({row['seconds']:.0f} s)"
        )
        rows.append(row)
    return rows


def _numbers(
    text: str, kind: type[int] | type[float], option: str, low: float, high: float
) -> list[Any]:
    """The comma separated numbers of ``text``, each from ``low`` to ``high``."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise RecipeError(
            f"{option} must be numbers between commas, got {text!r}; for example {option} 20,50"
        ) from error
    for value in values:
        if not low <= value <= high:
            raise RecipeError(f"{option} must lie between {low} and {high}, got {value}")
    return values


def _print(report: dict[str, Any]) -> None:
    table = Table("steps", "guidance", "FID", title=f"{report['model']}: {report['images']} images")
    for row in report["rows"]:
        table.add_row(str(row["steps"]), str(row["guidance"]), f"{row['fid']:.3f}")
    if report["real"] is not None:
        table.add_row("", "real images", f"{report['real']['fid']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    app()
