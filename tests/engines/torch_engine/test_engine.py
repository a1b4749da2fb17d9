"""The torch engine on a CPU, where the kernels' meaning in torch stands in for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qdit.calibrate.sampling import SamplingSettings, sample_images
from qdit.calibrate.schemes import LayerScheme
from qdit.engines.engine import Engine
from qdit.engines.torch_engine.engine import TorchEngine
from qdit.engines.torch_engine.linears import IntegerPart, PlainPart, WeightOnlyPart
from qdit.errors import InputError

BLOCK = "transformer_blocks.0"
Q, K, V = (f"{BLOCK}.attn1.to_{name}" for name in "qkv")
OUT, UP, DOWN = f"{BLOCK}.attn1.to_out.0", f"{BLOCK}.ff.net.0.proj", f"{BLOCK}.ff.net.2"
ADALN = f"{BLOCK}.norm1.linear"

PLAIN = LayerScheme(16, 16)
SCHEMES = {
    "w4a8": LayerScheme(4, 8, 32, 64),
    "w8a8 channel token": LayerScheme(8, 8, "channel", "token"),
    "asymmetric": LayerScheme(4, 8, 32, 64, False, False),
    "integer scales": LayerScheme(4, 8, 32, "token", scale_format="integer"),
    "weight-only": LayerScheme(4, 16, 64),
    "16/16": PLAIN,
}
MIXED = {
    Q: LayerScheme(8, 8, 64, 64),
    V: PLAIN,
    OUT: LayerScheme(6, 4, 64, 32),
    UP: PLAIN,
    DOWN: LayerScheme(3, 8, 128, 32, False, False, "float32"),
    ADALN: LayerScheme(8, 16, 64),
}


@pytest.fixture(autouse=True)
def _two_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs_of(made: Any, batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x, timestep, label = made.model.family.example_inputs(made.model.denoiser, batch, random)
    return x, timestep, label


def engine_of(made: Any, **options: Any) -> TorchEngine:
    return TorchEngine(made.checkpoint, device="cpu", **options)


@torch.no_grad()
def relative_distance(made: Any, engine: TorchEngine, batch: int = 3) -> tuple[float, float]:
    """(engine from simulation, simulation from full precision), both relative."""
    inputs = inputs_of(made, batch)
    family = made.model.family
    simulated = family.forward(made.checkpoint.build_denoiser(), *inputs)
    full = family.forward(made.model.denoiser, *inputs)
    output = engine.run(*inputs).float()
    assert output.shape == simulated.shape
    return (
        float((output - simulated).norm() / simulated.norm()),
        float((simulated - full).norm() / full.norm()),
    )


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("dtype", "bound"), [("float16", 4e-3), ("bfloat16", 3e-2)])
def test_is_the_simulation_but_for_16_bit_rounding(
    name: str, dtype: str, bound: float, make_quantized: Callable[..., Any]
) -> None:
    made = make_quantized(SCHEMES[name])
    distance, of_quantization = relative_distance(made, engine_of(made, dtype=dtype))
    assert distance <= bound
    if name in ("w4a8", "asymmetric", "integer scales", "weight-only"):
        assert distance < of_quantization / 5 or dtype == "bfloat16"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation_fn", ["gelu", "gelu-approximate"])
def test_mixed_plans_embedders_and_activations(
    tied: bool, activation_fn: str, make_quantized: Callable[..., Any]
) -> None:
    made = make_quantized(SCHEMES["w4a8"], MIXED, tied=tied, activation_fn=activation_fn)
    distance, _ = relative_distance(made, engine_of(made))
    assert distance <= 4e-3


def parts_of(engine: TorchEngine, role: str) -> list[Any]:
    assert engine.module is not None
    block: Any = engine.module.blocks[0]
    return list(getattr(block, role).parts)


def test_linears_of_one_input_and_scheme_are_one_product(
    make_quantized: Callable[..., Any],
) -> None:
    uniform = parts_of(engine_of(make_quantized(SCHEMES["w4a8"])), "attention_in")
    assert [[spec.name for spec in part.specs] for part in uniform] == [[Q, K, V]]
    mixed = engine_of(make_quantized(SCHEMES["w4a8"], MIXED))
    attention = parts_of(mixed, "attention_in")
    assert [[spec.name for spec in part.specs] for part in attention] == [[Q], [K], [V]]
    assert [type(part) for part in attention] == [IntegerPart, IntegerPart, PlainPart]


@pytest.mark.parametrize(("tied", "products"), [(True, 1), (False, 2)])
def test_all_modulations_are_one_product_where_the_embedder_is_one(
    tied: bool, products: int, make_quantized: Callable[..., Any]
) -> None:
    layers = {f"transformer_blocks.{i}.norm1.linear": LayerScheme(4, 16, 64) for i in range(2)}
    engine = engine_of(make_quantized(SCHEMES["w4a8"], layers, tied=tied))
    assert engine.module is not None
    groups: Any = engine.module._modulations.groups
    assert len(groups) == products
    assert all(type(part) is WeightOnlyPart for group in groups for part in group.parts)


def test_offers_what_every_engine_does(make_quantized: Callable[..., Any]) -> None:
    made = make_quantized(SCHEMES["w4a8"])
    engine: Engine = engine_of(made)
    assert [(spec.name, spec.dtype, spec.shape) for spec in engine.input_specs] == [
        ("hidden_states", np.dtype(np.float32), ("batch", 3, 8, 8)),
        ("timestep", np.dtype(np.int64), ("batch",)),
        ("class_labels", np.dtype(np.int64), ("batch",)),
    ]
    names = [spec.name for spec in engine.input_specs]
    arrays = {name: value.numpy() for name, value in zip(names, inputs_of(made, 2), strict=True)}
    made_arrays = engine.infer(arrays)
    (output,) = engine.output_specs
    assert made_arrays.keys() == {output.name}
    assert made_arrays[output.name].dtype == output.dtype
    assert made_arrays[output.name].shape == (2, *output.shape[1:])
    with pytest.raises(InputError, match="got hidden_states"):
        engine.infer({"hidden_states": arrays["hidden_states"]})
    engine.close()
    with pytest.raises(InputError, match="closed; open it again"):
        engine.infer(arrays)


def test_images_are_those_of_the_simulation_nearly(make_quantized: Callable[..., Any]) -> None:
    made = make_quantized(SCHEMES["w4a8"])
    model, settings = made.model, SamplingSettings(4, 1.5, 0)
    engine, simulation, full = (
        sample_images(model, denoiser, settings, range(3), batch_size=2, device="cpu")
        for denoiser in (
            engine_of(made).as_denoiser(model.family, model.config),
            model.as_denoiser(made.checkpoint.build_denoiser()),
            model.as_denoiser(),
        )
    )
    assert (engine - simulation).norm() < (simulation - full).norm() / 5


def test_a_checkpoint_is_read_from_its_folder(
    tmp_path: Path, make_quantized: Callable[..., Any]
) -> None:
    made = make_quantized(SCHEMES["w4a8"])
    made.checkpoint.write(tmp_path)
    inputs = inputs_of(made, 2)
    read = TorchEngine(tmp_path, device="cpu").run(*inputs)
    assert torch.equal(read, engine_of(made).run(*inputs))


def test_images_do_not_depend_on_their_batch(make_quantized: Callable[..., Any]) -> None:
    engine, made = None, make_quantized(SCHEMES["w4a8"])
    engine = engine_of(made)
    x, timestep, label = inputs_of(made, 3)
    together = engine.run(x, timestep, label).float()
    for i in range(3):
        alone = engine.run(x[i : i + 1], timestep[i : i + 1], label[i : i + 1]).float()
        assert (alone[0] - together[i]).norm() / together[i].norm() < 2e-3


def test_weights_take_their_packed_size(make_quantized: Callable[..., Any]) -> None:
    """A DiT of hidden size 128: 4 bits and a float32 scale a 64 against 16 bits."""
    wide = {"attention_head_dim": 64}
    scheme = LayerScheme(4, 8, 64, 64)
    layers = {f"transformer_blocks.{i}.norm1.linear": LayerScheme(4, 16, 64) for i in range(2)}
    packed = engine_of(make_quantized(scheme, layers, **wide)).weight_bytes
    plain = engine_of(make_quantized(PLAIN, **wide)).weight_bytes
    linears = make_quantized(PLAIN, **wide).model.linears
    weights = sum(spec.in_features * spec.out_features for spec in linears)
    assert plain - packed == pytest.approx(weights * (2 - 0.5 - 4 / 64))


@pytest.mark.parametrize(
    ("scheme", "options", "changes", "message"),
    [
        (SCHEMES["w4a8"], {"dtype": "float32"}, {}, "in float16 or bfloat16, got 'float32'"),
        (
            LayerScheme(4, 8, "channel", "token"),
            {},
            {"attention_head_dim": 18},
            rf"the torch engine cannot run {ADALN}: .* multiples of 32, got 36",
        ),
    ],
)
def test_what_it_does_not_run_is_refused(
    scheme: LayerScheme,
    options: dict[str, Any],
    changes: dict[str, Any],
    message: str,
    make_quantized: Callable[..., Any],
) -> None:
    with pytest.raises(InputError, match=message):
        engine_of(make_quantized(scheme, **changes), **options)
