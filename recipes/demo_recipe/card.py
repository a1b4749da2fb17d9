"""The model card: written from the run's record, with a FID table between two markers."""

import platform
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import onnxruntime
import torch

from demo_recipe.errors import RecipeError
from demo_recipe.files import write_text
from demo_recipe.images import SOURCE

FID_START = "<!-- fid: written by evaluate_demo.py --update-card -->"
FID_END = "<!-- /fid -->"
CURVE_ROWS = 12


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that shape the result."""
    modules = (torch, diffusers, onnx, onnxruntime, np)
    found = {module.__name__: str(module.__version__) for module in modules}
    return {"python": platform.python_version(), **found}


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture for a CPU."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU ({platform.machine()})"


def write_card(folder: Path, record: dict[str, Any]) -> None:
    """Write ``README.md`` into ``folder`` from the record that ``training.json`` holds."""
    write_text(folder / "README.md", _card(record))


def update_card(folder: Path, report: dict[str, Any]) -> None:
    """Put the FID table of ``report`` into the card of ``folder``.

    Raises:
        RecipeError: the folder holds no card with the two markers.
    """
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if FID_START not in text or FID_END not in text:
        raise RecipeError(
            f"the card must be a README.md written by train_demo.py, got {str(path)!r}; "
            "leave out --update-card"
        )
    head, rest = text.split(FID_START, 1)
    tail = rest.split(FID_END, 1)[1]
    write_text(path, f"{head}{FID_START}\n{_fid_table(report)}\n{FID_END}{tail}")


def _card(record: dict[str, Any]) -> str:
    images, extractor = record["images"], record["extractor"]
    return f"""# Class-conditional DiT on CIFAR-10, pixel space

A `diffusers` `DiTTransformer2DModel` ({record["parameters"]:,} parameters, fp16, EMA weights) that
predicts epsilon on 32×32×3 images, patch 2; labels {_label_text(images["classes"])}, label 10 is
the null label for classifier-free guidance. Trained from scratch with `recipes/train_demo.py`.

| file | what it is |
|---|---|
| `transformer/`, `scheduler/` | the model and its `DDIMScheduler` |
| `features.onnx` | `images` float32 [N,3,32,32] in [-1,1]; `features` [N,256], `logits` [N,10] |
| `reference.npz` | `mu` [256], `sigma` [256,256] of the features of the training images |
| `training.json` | the settings and figures below, for programs |

## Data

{SOURCE} (JPEG copies of CIFAR-10): {images["train"]:,} training and {images["test"]:,} test images.
SHA-256 of the decoded training images: `{images["sha256"]}`.

## Training

```
{record["command"]}
```

| | |
|---|---|
| device | {record["device"]} |
| wall time | {_minutes(record["wall_seconds"])} in all |
| DiT steps | {record["steps"]:,}: {record["epochs"]:.1f} epochs |
| DiT training time | {_minutes(record["dit_seconds"])}, the compiler not counted |
| extractor | {_minutes(extractor["seconds"])}, test accuracy {extractor["accuracy"]:.2%} |
| versions | {", ".join(f"{name} {version}" for name, version in record["versions"].items())} |

DiT settings: {_settings_text(record["settings"]["dit"])}.

Extractor settings: {_settings_text(record["settings"]["extractor"])}.

The images are flipped at random. Timesteps are stratified over the batch, the loss is the min-SNR
weighted epsilon loss, the learning rate falls to zero along a cosine after a linear warm-up.

Mean training loss since the row before:

{_curve(record["history"])}

## Quality

{FID_START}
not measured yet
{FID_END}
"""


def _label_text(classes: list[str]) -> str:
    return ", ".join(f"{label} {name}" for label, name in enumerate(classes))


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"


def _settings_text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())


def _curve(history: list[list[float]]) -> str:
    """About a dozen rows of the loss, each the mean over all steps since the row before."""
    lines = ["| step | loss | seconds |", "|---|---|---|"]
    size = max(1, -(-len(history) // CURVE_ROWS))
    for start in range(0, len(history), size):
        part = history[start : start + size]
        loss = sum(row[1] for row in part) / len(part)
        lines.append(f"| {part[-1][0]:.0f} | {loss:.4f} | {part[-1][2]:.0f} |")
    return "\n".join(lines)


def _fid_table(report: dict[str, Any]) -> str:
    lines = ["| sampling | FID |", "|---|---|"]
    lines += [
        f"| {row['steps']} steps, guidance {row['guidance']} | {row['fid']:.3f} |"
        for row in report["rows"]
    ]
    real = report["real"]
    if real is not None:
        lines.append(f"| ({real['images']:,} real images) | {real['fid']:.3f} |")
    return "\n".join(
        [
            f"{report['images']:,} images, labels 0…9 in turn, DDIM, {report['precision']}, seed "
            f"{report['seed']}, features of `features.onnx`, on {report['device']}:",
            "",
            *lines,
        ]
    )
