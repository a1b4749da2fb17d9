"""The whole training run: extractor, reference statistics, DiT, model card; each part resumes."""

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from demo_recipe.card import device_name, versions, write_card
from demo_recipe.dit import build_model, save_model
from demo_recipe.errors import RecipeError
from demo_recipe.extractor import ExtractorSettings, accuracy, extract, train_extractor
from demo_recipe.extractor_onnx import export_extractor
from demo_recipe.fid import save_statistics, statistics_of
from demo_recipe.files import write_json
from demo_recipe.images import ImageSet
from demo_recipe.trainer import Trainer, TrainSettings

STATE_FOLDER = ".training"


@dataclass(frozen=True)
class Run:
    """One output folder with the settings that its parts must have been made with."""

    output: Path
    dit: TrainSettings
    extractor: ExtractorSettings
    device: torch.device
    compiled: bool
    checkpoint_minutes: float
    command: str

    @property
    def state(self) -> Path:
        """The folder of what a resumed run reads; it stays when the run is over."""
        return self.output / STATE_FOLDER

    def finished(self) -> bool:
        """Whether the run's last file is there."""
        return (self.output / "training.json").is_file()

    def prepare(self, images: dict[str, Any], resume: bool) -> None:
        """Start a new run, or check that the one in the output folder has the same settings.

        Raises:
            RecipeError: the folder holds a run with other settings or images.
        """
        wanted = {"images": images, "dit": asdict(self.dit), "extractor": asdict(self.extractor)}
        path = self.state / "run.json"
        if not resume or not path.is_file():
            shutil.rmtree(self.state, ignore_errors=True)
            (self.output / "training.json").unlink(missing_ok=True)
            write_json(path, wanted)
            return
        changes = _differences(json.loads(path.read_text(encoding="utf-8")), wanted)
        if changes:
            raise RecipeError(
                f"{str(self.output)!r} holds a run with other settings ({', '.join(changes)}); "
                "pass --no-resume to start over, or another --output"
            )

    def train(self, train: ImageSet, test: ImageSet, images: dict[str, Any]) -> dict[str, Any]:
        """Run all parts on ``train`` and ``test`` (on the device); return the record."""
        start = time.monotonic()
        extractor = self.make_extractor(train, test)
        model = build_model(self.dit.seed)
        checkpoint = self.state / "checkpoint.safetensors"
        trainer = Trainer(model, train, self.dit, checkpoint, self.compiled)
        counters = trainer.run(self.checkpoint_minutes)
        save_model(model, self.output)
        record = {
            "command": self.command,
            "device": device_name(self.device),
            "versions": versions(),
            "settings": {"dit": asdict(self.dit), "extractor": asdict(self.extractor)},
            "images": images,
            "extractor": extractor,
            "parameters": sum(value.numel() for value in model.parameters()),
            "steps": counters.step,
            "epochs": counters.step * self.dit.batch_size / len(train),
            "dit_seconds": counters.seconds,
            # a resumed run cannot know the process time of the run before it: never below the parts
            "wall_seconds": max(time.monotonic() - start, extractor["seconds"] + counters.seconds),
            "history": counters.history,
        }
        write_card(self.output, record)
        write_json(self.output / "training.json", record)
        checkpoint.unlink(missing_ok=True)
        return record

    def make_extractor(self, train: ImageSet, test: ImageSet) -> dict[str, float]:
        """Train and write ``features.onnx`` and ``reference.npz``, unless an earlier run has."""
        path = self.state / "extractor.json"
        if path.is_file():
            return dict(json.loads(path.read_text(encoding="utf-8")))
        network, seconds = train_extractor(train, self.extractor, self.device)
        features, _ = extract(network, train.images)
        export_extractor(network, self.output / "features.onnx")
        save_statistics(self.output / "reference.npz", statistics_of(features))
        result = {"accuracy": accuracy(network, test), "seconds": seconds}
        write_json(path, result)
        return result


def describe_images(train: ImageSet, test: ImageSet) -> dict[str, Any]:
    """Counts, class names and the hash of the decoded training images."""
    return {
        "train": len(train),
        "test": len(test),
        "classes": list(train.classes),
        "sha256": hashlib.sha256(train.images.numpy().tobytes()).hexdigest(),
    }


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """``part.name old -> new`` for each setting that differs."""
    changes = []
    for part, values in wanted.items():
        before = saved.get(part, {})
        for name, value in values.items():
            if before.get(name) != value:
                changes.append(f"{part}.{name} {before.get(name)} -> {value}")
    return changes
