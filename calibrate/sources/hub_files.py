"""Files of a model on the Hugging Face Hub, fetched into its cache."""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError
from .weight_files import WEIGHTS_STEM
from .weights_only import first_line

_CONFIGS = ["model_index.json", "*/config.json", "scheduler/*.json", "*/*.index.json"]
_COMPONENTS = ("transformer", "vae")


def fetch(model_id: str) -> Path:
    """The snapshot folder in the local cache; safetensors are preferred to pickles."""
    from huggingface_hub import snapshot_download

    try:
        for suffix in (".safetensors", ".bin"):
            folder = Path(snapshot_download(model_id, allow_patterns=_patterns(suffix)))
            if _has_all_weights(folder):
                return folder
    except Exception as error:  # no network, no such repository, no access: each has its own class
        raise InputError(
            f"cannot fetch {model_id} from the Hub: {first_line(error)} "
            f"(a folder downloaded elsewhere works too: give its path)"
        ) from error
    raise InputError(f"{model_id} has no diffusers transformer/ with weights; see its Hub page")


def _patterns(suffix: str) -> list[str]:
    """What to fetch: configs, and full-precision weights in one file or in shards."""
    weights = [
        f"{component}/{WEIGHTS_STEM}{part}{suffix}"
        for component in _COMPONENTS
        for part in ("", "-*-of-*")
    ]
    return [*_CONFIGS, *weights]


def _has_all_weights(folder: Path) -> bool:
    present = [folder / name for name in _COMPONENTS if (folder / name / "config.json").is_file()]
    return bool(present) and all(
        any(part.glob(f"{WEIGHTS_STEM}*.safetensors")) or any(part.glob(f"{WEIGHTS_STEM}*.bin"))
        for part in present
    )
