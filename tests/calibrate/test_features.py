"""Feature networks: both file kinds, batching, and every refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from qdit.calibrate.features import load_features, to_uint8
from qdit.errors import ArtifactError, InputError, StepError


class ChannelMeans(nn.Module):
    """The calling convention of inception-2015-12-05.pt around a mean over each channel."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        assert img.dtype == torch.uint8
        means = img.to(torch.float32).mean([2, 3])
        return means if return_features else means.softmax(1)


class NoSuchFlag(nn.Module):
    def forward(self, img: Tensor) -> Tensor:
        return img.float()


class WrongRank(nn.Module):
    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        return img.to(torch.float32).mean()


def scripted(path: Path, module: nn.Module) -> Path:
    torch.jit.script(module).save(str(path))
    return path


def onnx_means(
    path: Path, *, batch: int | str = "n", size: int | str = 8, output: str = "features"
) -> Path:
    """Mean over H and W: features [n, 3] that a test can work out."""
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["images", "axes"], [output], keepdims=0)],
        "means",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, size, size])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, 3])],
        [helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path


@pytest.fixture
def images() -> Tensor:
    return torch.rand(70, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("batch", ["n", 32, 1], ids=["dynamic", "batch32", "batch1"])
def test_onnx_features_are_float64_and_whole_whatever_the_files_batch(
    tmp_path: Path, images: Tensor, batch: int | str
) -> None:
    features = load_features(onnx_means(tmp_path / "means.onnx", batch=batch))(images)
    assert features.dtype == np.float64
    np.testing.assert_allclose(features, images.mean(dim=(2, 3)).numpy(), atol=1e-6)


def test_torchscript_gets_uint8_images_and_return_features(tmp_path: Path, images: Tensor) -> None:
    extractor = load_features(scripted(tmp_path / "inception-2015-12-05.pt", ChannelMeans()))
    features = extractor(images)
    # The published convention: round (x + 1)·127.5 to nearest
    expected = ((images.double() + 1) * 127.5 + 0.5).floor().mean(dim=(2, 3))
    assert features.shape == (70, 3)
    np.testing.assert_allclose(features, expected.numpy(), rtol=1e-6)


def test_uint8_conversion_covers_the_range_and_clips() -> None:
    # -1 → 0, 0 → 128 (127.5 rounds up), 1 → 255; outside values are clipped
    values = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5])
    assert to_uint8(values).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("name", ["net.safetensors", "net", "net.ONNX2"])
def test_unknown_extensions_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"must be one of \.onnx, \.pt, got"):
        load_features(tmp_path / name)


@pytest.mark.parametrize("name", ["net.onnx", "net.pt"])
def test_missing_and_unreadable_files_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no feature network at"):
        load_features(tmp_path / name)
    (tmp_path / name).write_bytes(b"not a network")
    with pytest.raises(ArtifactError, match="not a loadable"):
        load_features(tmp_path / name)


def test_an_onnx_file_without_the_features_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="must have an output named 'features', got logits"):
        load_features(onnx_means(tmp_path / "net.onnx", output="logits"))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 16, 16), r"needs images of shape \[3, 8, 8\], got \[3, 16, 16\]; give"),
        ((2, 1, 8, 8), r"must have shape \[n, 3, H, W\], got \[2, 1, 8, 8\]"),
        ((0, 3, 8, 8), r"must have shape \[n, 3, H, W\], got \[0, 3, 8, 8\]"),
    ],
    ids=["size", "grey", "none"],
)
def test_wrong_images_are_refused(tmp_path: Path, shape: tuple[int, ...], message: str) -> None:
    extractor = load_features(onnx_means(tmp_path / "net.onnx"))
    with pytest.raises(InputError, match=message):
        extractor(torch.zeros(shape))


def test_an_onnx_file_of_free_size_takes_any_size(tmp_path: Path) -> None:
    extractor = load_features(onnx_means(tmp_path / "net.onnx", size="side"))
    assert extractor(torch.ones(2, 3, 5, 5)).tolist() == [[1, 1, 1], [1, 1, 1]]


def test_torchscript_modules_with_another_interface_are_named(tmp_path: Path) -> None:
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(StepError, match=r"net\.pt failed on images of shape \[3, 8, 8\]"):
        load_features(scripted(tmp_path / "net.pt", NoSuchFlag()))(images)
    with pytest.raises(ArtifactError, match=r"features of shape \[2, D\], got \[\]"):
        load_features(scripted(tmp_path / "rank.pt", WrongRank()))(images)
