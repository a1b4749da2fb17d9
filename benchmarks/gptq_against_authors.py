"""GPTQ here against the Q-DiT authors' code: time and layer errors, same weights, same inputs.

    git clone https://github.com/Juanerx/Q-DiT peer
    python benchmarks/gptq_against_authors.py --peer peer --device cuda --json gptq.json
    python benchmarks/gptq_against_authors.py --peer peer --model random:DiT-S/2 --blocks 1 \
        --samples 8 --steps 8 --held-out 4            # a smoke run on a CPU

Random weights of a published shape, a calibration set from the model's own trajectories; both
sides quantize it as w4a8 with the authors' defaults (asymmetric unless --symmetric). Then, layer
by layer, ‖X(W−Ŵ)ᵀ‖ / ‖XWᵀ‖ on inputs X that neither side has seen: those of the full-precision
model on trajectories of another seed. Their code runs unmodified in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qdit.calibrate.blockwise import quantize_model
from qdit.calibrate.gptq import GptqSettings
from qdit.calibrate.hessian import exact_float32
from qdit.calibrate.model import DiffusionModel
from qdit.calibrate.plan import uniform_plan
from qdit.calibrate.sampling import SamplingSettings
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.sources import load_model
from qdit.calibrate.trajectories import CalibrationSet, collect_calibration_set
from qdit.files import write_json
from qdit.progress import Terminal

WORKER = Path(__file__).with_name("authors_gptq_worker.py")
BLOCK_NAMES = {
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
    "norm1.linear": "adaLN_modulation.1",
}
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", type=Path, help="clone of Juanerx/Q-DiT; without it only we run")
    parser.add_argument(
        "--peer-python", default=sys.executable, help="runs their code: torch, timm, transformers"
    )
    parser.add_argument("--model", default="random:DiT-XL/2")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--per-trajectory", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--bits", type=int, default=4, help="weight bits; activations have 8")
    parser.add_argument("--group", type=int, default=128, help="of weights and activations")
    parser.add_argument("--symmetric", action="store_true", help="weights; default asymmetric")
    parser.add_argument("--clipped", action="store_true", help="search our group ranges")
    parser.add_argument("--order", default="activation", choices=["activation", "natural"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def load(options: argparse.Namespace) -> DiffusionModel:
    """The model with the two constants in which the original differs from diffusers set to its."""
    model = load_model(options.model, seed=options.seed, blocks=options.blocks)
    for block in model.family.blocks(model.denoiser):
        norm: Any = block.norm3
        norm.eps = 1e-6
        embedding: Any = block.norm1
        embedding.emb.time_proj.downscale_freq_shift = 0
    return model


def scheme_of(options: argparse.Namespace) -> LayerScheme:
    # float32 scales and asymmetric activations: what the authors' code does by default
    return LayerScheme(
        options.bits,
        8,
        options.group,
        options.group,
        weight_symmetric=options.symmetric,
        activation_symmetric=False,
        scale_dtype="float32",
    )


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def calibration_of(
    model: DiffusionModel, options: argparse.Namespace, samples: int, seed: int
) -> CalibrationSet:
    return collect_calibration_set(
        model,
        SamplingSettings(options.steps, options.guidance, seed),
        samples,
        per_trajectory=min(options.per_trajectory, options.steps),
        batch_size=options.batch,
        device=options.device,
    )


def original_state(model: DiffusionModel) -> dict[str, Tensor]:
    """The denoiser's weights under the names of facebookresearch/DiT, qkv fused."""
    ours = model.denoiser.state_dict()
    embedder = "transformer_blocks.0.norm1.emb."
    renamed = {
        "pos_embed": model.denoiser.get_submodule("pos_embed").get_buffer("pos_embed"),
        "y_embedder.embedding_table.weight": ours[
            f"{embedder}class_embedder.embedding_table.weight"
        ],
    }
    for kind in ("weight", "bias"):
        renamed[f"x_embedder.proj.{kind}"] = ours[f"pos_embed.proj.{kind}"]
        renamed[f"final_layer.adaLN_modulation.1.{kind}"] = ours[f"proj_out_1.{kind}"]
        renamed[f"final_layer.linear.{kind}"] = ours[f"proj_out_2.{kind}"]
        for position, linear in ((0, "linear_1"), (2, "linear_2")):
            source = f"{embedder}timestep_embedder.{linear}.{kind}"
            renamed[f"t_embedder.mlp.{position}.{kind}"] = ours[source]
        for block in range(len(model.family.blocks(model.denoiser))):
            here, there = f"transformer_blocks.{block}.", f"blocks.{block}."
            parts = [ours[f"{here}{name}.{kind}"] for name in QKV]
            renamed[f"{there}attn.qkv.{kind}"] = torch.cat(parts)
            for name, original in BLOCK_NAMES.items():
                renamed[f"{there}{original}.{kind}"] = ours[f"{here}{name}.{kind}"]
    return {name: tensor.detach().cpu().contiguous() for name, tensor in renamed.items()}


def weights_by_our_names(restored: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Their weights [N, K] by our linears' names, qkv split."""
    ours = {}
    for name in names:
        _, block, path = name.split(".", 2)
        if path in QKV:
            fused = restored[f"blocks.{block}.attn.qkv.weight"]
            ours[name] = fused.chunk(3)[QKV.index(path)]
        else:
            ours[name] = restored[f"blocks.{block}.{BLOCK_NAMES[path]}.weight"]
    return ours


def run_authors(
    options: argparse.Namespace, model: DiffusionModel, calibration: CalibrationSet, folder: Path
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """(their result, their restored weights by our names, their model's output on 4 samples)."""
    config: Any = model.denoiser.config
    job = {
        "config": {
            "input_size": config.sample_size,
            "patch_size": config.patch_size,
            "in_channels": config.in_channels,
            "hidden_size": config.num_attention_heads * config.attention_head_dim,
            "depth": len(model.family.blocks(model.denoiser)),
            "num_heads": config.num_attention_heads,
            "num_classes": config.num_embeds_ada_norm,
            "learn_sigma": config.out_channels == 2 * config.in_channels,
        },
        "device": options.device,
        "batch": options.batch,
        "weight_bits": options.bits,
        "activation_bits": 8,
        "group": options.group,
        "weight_symmetric": options.symmetric,
        "activation_symmetric": False,
        "damping": GptqSettings().damping,
    }
    write_json(folder / "job.json", job)
    save_file(original_state(model), folder / "weights.safetensors")
    calibration.write(folder / "calibration.safetensors")
    subprocess.run(
        [options.peer_python, str(WORKER), "--peer", str(options.peer.resolve()), str(folder)],
        check=True,
    )
    restored = load_file(folder / "restored.safetensors")
    probe = restored.pop("probe")
    names = [spec.name for spec in model.linears]
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result, weights_by_our_names(restored, names), probe


@torch.inference_mode()
def held_out_errors(
    model: DiffusionModel,
    inputs: CalibrationSet,
    candidates: dict[str, dict[str, Tensor]],
    options: argparse.Namespace,
) -> dict[str, dict[str, float]]:
    """‖X(W−Ŵ)ᵀ‖ / ‖XWᵀ‖ by candidate and linear, X from the full-precision model."""
    sums: dict[tuple[str, str], Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))

    def watch(name: str, linear: nn.Module) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].reshape(-1, arguments[0].shape[-1])
            weight = linear.get_parameter("weight")
            sums["", name] += (x @ weight.t()).double().square().sum().cpu()
            for candidate, weights in candidates.items():
                difference = weight - weights[name].to(x)
                sums[candidate, name] += (x @ difference.t()).double().square().sum().cpu()

        return linear.register_forward_pre_hook(hook)

    names = [spec.name for spec in model.linears]
    handles = [watch(name, model.denoiser.get_submodule(name)) for name in names]
    with exact_float32():
        for batch in inputs.batches(options.batch):
            model.family.forward(model.denoiser, *(t.to(options.device) for t in batch.tensors))
    for handle in handles:
        handle.remove()
    return {
        candidate: {name: (sums[candidate, name] / sums["", name]).sqrt().item() for name in names}
        for candidate in candidates
    }


def by_role(model: DiffusionModel, errors: dict[str, float]) -> dict[str, float]:
    """Mean error of the linears of each role, and of all."""
    groups: dict[str, list[float]] = defaultdict(list)
    for spec in model.linears:
        groups[spec.role].append(errors[spec.name])
        groups["all"].append(errors[spec.name])
    return {role: sum(values) / len(values) for role, values in groups.items()}


def show(report: dict[str, Any], console: Console) -> None:
    table = Table("", *report["mean_errors"], title="relative output error on held-out inputs")
    roles = next(iter(report["mean_errors"].values()))
    for role in roles:
        table.add_row(role, *(f"{values[role]:.5f}" for values in report["mean_errors"].values()))
    console.print(table)
    for key, value in report["seconds"].items():
        console.print(f"{key}: {value:.2f} s")
    if "speedup" in report:
        console.print(f"speedup of GPTQ: {report['speedup']:.2f}")
        worse = report["layers_worse_than_authors"]
        console.print(f"layers worse than the authors': {worse} of {len(report['errors']['qdit'])}")
        console.print(f"outputs of the two fp models differ by {report['probe_difference']:.2e}")


def main() -> None:
    options = parse()
    report: dict[str, Any] = {
        "command": sys.argv,
        "machine": torch.cuda.get_device_name()
        if options.device.startswith("cuda")
        else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "seconds": {},
        "options": {key: str(value) for key, value in vars(options).items()},
    }
    model = load(options)
    synchronize(options.device)
    started = time.perf_counter()
    calibration = calibration_of(model, options, options.samples, options.seed)
    synchronize(options.device)
    report["seconds"]["collect calibration set"] = time.perf_counter() - started
    held_out = calibration_of(model, options, options.held_out, options.seed + 1)
    with torch.inference_mode(), exact_float32():
        probe = model.family.forward(
            model.denoiser, *(part[:4].to(options.device) for part in calibration.tensors)
        ).cpu()

    plan = uniform_plan(f"w{options.bits}a8", scheme_of(options), model.linears)
    candidates: dict[str, dict[str, Tensor]] = {}
    with Terminal() as progress:
        synchronize(options.device)
        started = time.perf_counter()
        result = quantize_model(
            model,
            plan,
            "gptq",
            calibration,
            batch_size=options.batch,
            device=options.device,
            progress=progress,
            settings=GptqSettings(clipped=options.clipped, order=options.order),
        )
        synchronize(options.device)
        report["seconds"]["qdit"] = time.perf_counter() - started
    if options.device.startswith("cuda"):
        report["peak_memory_bytes"] = {"qdit": torch.cuda.max_memory_allocated()}
    candidates["qdit"] = {name: w.dequantize() for name, w in result.weights.items()}

    model = load(options)  # quantization was in place
    if options.peer is not None:
        with tempfile.TemporaryDirectory() as folder:
            theirs, weights, their_probe = run_authors(options, model, calibration, Path(folder))
        candidates["authors"] = weights
        report["seconds"]["authors"] = theirs["seconds"]
        report["speedup"] = theirs["seconds"] / report["seconds"]["qdit"]
        report["probe_difference"] = ((their_probe - probe).norm() / probe.norm()).item()
        if "peak_memory_bytes" in report:
            report["peak_memory_bytes"]["authors"] = theirs["peak_memory_bytes"]
    model.denoiser.to(options.device)
    report["errors"] = held_out_errors(model, held_out, candidates, options)
    report["mean_errors"] = {
        key: by_role(model, errors) for key, errors in report["errors"].items()
    }
    if "authors" in candidates:
        ours, authors = report["errors"]["qdit"], report["errors"]["authors"]
        report["layers_worse_than_authors"] = sum(ours[name] > authors[name] for name in ours)
    show(report, Console())
    if options.json is not None:
        write_json(options.json, report)


if __name__ == "__main__":
    main()
