"""Runs the Q-DiT authors' own GPTQ, unmodified, on weights and inputs that another process wrote.

Started by gptq_against_authors.py. A process of its own because their package is called `qdit`
too. Their folder has no `qdit/__init__.py`, and an installed package would win over it: so the
name is bound to their folder before anything is imported. Needs `timm` and `transformers`.

Reads `job.json`, `weights.safetensors` (their names) and `calibration.safetensors` in the folder
given; writes `restored.safetensors` (their dequantized weights) and `result.json` there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import types
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, TensorDataset


def import_from(peer: Path) -> tuple[Any, Any]:
    """Their `models.models` and `qdit.modelutils`."""
    package = types.ModuleType("qdit")
    package.__path__ = [str(peer / "qdit")]
    sys.modules["qdit"] = package
    sys.path.insert(0, str(peer))
    import models.models as architecture  # type: ignore[import-not-found]

    from qdit import modelutils  # type: ignore[attr-defined]

    return architecture, modelutils


def arguments_of(job: dict[str, Any]) -> argparse.Namespace:
    """The namespace that their quant_main.py builds, its defaults where the job says nothing."""
    blocks = job["config"]["depth"]
    return argparse.Namespace(
        wbits=job["weight_bits"],
        abits=job["activation_bits"],
        exponential=False,
        quantize_bmm_input=False,
        a_sym=job["activation_symmetric"],
        w_sym=job["weight_symmetric"],
        static=False,
        weight_group_size=[job["group"]] * blocks,
        weight_channel_group=1,
        act_group_size=[job["group"]] * blocks,
        tiling=0,
        percdamp=job["damping"],
        use_gptq=True,
        quant_method="max",
        a_clip_ratio=1.0,
        w_clip_ratio=1.0,
        kv_clip_ratio=1.0,
        quant_type="int",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    architecture, modelutils = import_from(options.peer)
    job = json.loads((options.folder / "job.json").read_text())
    device = job["device"]
    if device == "cpu":  # their code waits for a GPU after each layer
        torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]

    model = architecture.DiT(**job["config"])
    model.load_state_dict(load_file(options.folder / "weights.safetensors"))
    model.eval().to(device)
    tensors = load_file(options.folder / "calibration.safetensors")
    inputs = [tensors[name] for name in ("hidden_states", "timestep", "class_labels")]
    loader = DataLoader(TensorDataset(*inputs), batch_size=job["batch"])
    with torch.no_grad():  # kernels loaded, and a figure that shows both models are one
        probe = model(*(part[:4].to(device) for part in inputs)).cpu()

    args = arguments_of(job)
    torch.cuda.synchronize()
    started = time.perf_counter()
    model = modelutils.add_act_quant_wrapper(model, device, args, defaultdict(lambda: None))
    model = modelutils.quantize_model_gptq(model, device, args, loader)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started

    restored = {
        f"{name}.weight": module.weight.detach().cpu().contiguous()
        for name, module in model.named_modules()
        if type(module).__name__ == "QLinearLayer"
    }
    save_file(restored | {"probe": probe}, options.folder / "restored.safetensors")
    peak = torch.cuda.max_memory_allocated() if device != "cpu" else None
    result = {"seconds": seconds, "peak_memory_bytes": peak}
    (options.folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
