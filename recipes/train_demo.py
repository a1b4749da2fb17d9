"""Train the demo: a feature extractor for FID and a class-conditional DiT on CIFAR-10 images.

recipes/README.md shows the command lines and says what comes out.
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from demo_recipe.cli import pick_device
from demo_recipe.errors import RecipeError, exit_on_recipe_error
from demo_recipe.extractor import ExtractorSettings
from demo_recipe.images import load_train_and_test
from demo_recipe.run import Run, describe_images
from demo_recipe.trainer import TrainSettings

DEFAULT_MINUTES = 12.5

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    images: Annotated[Path, typer.Option(help="Folder with train/<class>/ and test/<class>/.")],
    output: Annotated[Path, typer.Option(help="Folder that the run writes.")],
    steps: Annotated[int | None, typer.Option(help="Training steps of the DiT.")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Training minutes of the DiT; the learning rate reaches zero when they are over. "
            f"Default {DEFAULT_MINUTES} unless --steps is given."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 1024,
    optimizer: Annotated[str, typer.Option(help="muon or adamw.")] = TrainSettings.optimizer,
    learning_rate: Annotated[
        float, typer.Option(help="Peak of the schedule.")
    ] = TrainSettings.learning_rate,
    extractor_epochs: Annotated[int, typer.Option(min=1, help="Epochs of the extractor.")] = 60,
    max_images: Annotated[
        int | None, typer.Option(min=10, help="Use about this many images a split.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    resume: Annotated[bool, typer.Option(help="Continue the run in --output.")] = True,
    checkpoint_minutes: Annotated[
        float, typer.Option(min=0.0, help="Minutes between checkpoints.")
    ] = 2.0,
    compile_model: Annotated[
        bool, typer.Option("--compile/--no-compile", help="torch.compile the loss on a GPU.")
    ] = True,
) -> None:
    """Train the extractor and the DiT on IMAGES and write both with a model card to OUTPUT."""
    with exit_on_recipe_error():
        place = pick_device(device)
        run = Run(
            output=output,
            dit=TrainSettings(
                steps=steps,
                minutes=DEFAULT_MINUTES if steps is None and minutes is None else minutes,
                batch_size=batch_size,
                optimizer=optimizer,
                learning_rate=learning_rate,
                seed=seed,
            ),
            extractor=ExtractorSettings(epochs=extractor_epochs, seed=seed),
            device=place,
            compiled=compile_model and place.type == "cuda",
            checkpoint_minutes=checkpoint_minutes,
            command=shlex.join(["python", *sys.argv]),
        )
        _train(run, images, max_images, resume)


def _train(run: Run, images: Path, max_images: int | None, resume: bool) -> None:
    if run.output.is_file():
        raise RecipeError(f"--output must be a folder, got the file {str(run.output)!r}")
    train, test = load_train_and_test(images, max_images)
    description = describe_images(train, test)
    run.prepare(description, resume)
    if run.finished():
        typer.echo(f"{run.output} is complete; pass --no-resume to train again")
        return
    record = run.train(train.to(run.device), test.to(run.device), description)
    typer.echo(
        f"{run.output}: {record['steps']} steps in {record['dit_seconds']:.0f} s, "
        f"extractor accuracy {record['extractor']['accuracy']:.2%}, "
        f"{record['wall_seconds']:.0f} s in all"
    )


if __name__ == "__main__":
    app()
