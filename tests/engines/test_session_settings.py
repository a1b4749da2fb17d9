"""Providers and session options: what is asked for, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdit.engines.bench_job import run_bench
from qdit.engines.options import SchemeOptions, ValidateOptions, build_options
from qdit.engines.session_settings import (
    parse_provider_options,
    parse_session_options,
    providers_of,
)
from qdit.engines.validate_job import run_validate
from qdit.errors import InputError
from qdit.progress import Silent

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@pytest.mark.parametrize(
    ("provider", "device", "wanted"),
    [
        (None, "cpu", [CPU]),
        (None, "cuda:1", [CUDA, CPU]),
        (CPU, "cuda", [CPU]),
        ("DnnlExecutionProvider", "cpu", ["DnnlExecutionProvider", CPU]),
        ("cuda", "cpu", [CUDA, CPU]),
        ("cpu", "cuda", [CPU]),
    ],
)
def test_the_named_provider_comes_first(
    provider: str | None, device: str, wanted: list[str]
) -> None:
    assert providers_of(provider, device) == wanted


def test_options_are_keys_and_values() -> None:
    assert parse_session_options(["session.a=1", "session.b=x=y"]) == {
        "session.a": "1",
        "session.b": "x=y",
    }


@pytest.mark.parametrize("entry", ["session.a", "threads=2", "session.a="])
def test_other_forms_are_refused(entry: str) -> None:
    with pytest.raises(InputError, match=r"must look like session\.use_env_allocators=1"):
        parse_session_options([entry])


def test_one_given_twice_is_refused() -> None:
    with pytest.raises(InputError, match=r"session\.a is given twice"):
        parse_session_options(["session.a=1", "session.a=2"])


def test_provider_options_need_no_dot() -> None:
    assert parse_provider_options(["enable_cuda_graph=1"]) == {"enable_cuda_graph": "1"}


@pytest.mark.parametrize("entry", ["enable_cuda_graph", "=1", "use_tf32="])
def test_other_forms_of_provider_options_are_refused(entry: str) -> None:
    with pytest.raises(InputError, match="provider option must look like enable_cuda_graph=1"):
        parse_provider_options([entry])


def test_a_provider_option_given_twice_is_refused() -> None:
    with pytest.raises(InputError, match="provider option use_tf32 is given twice"):
        parse_provider_options(["use_tf32=0", "use_tf32=1"])


def test_an_engine_that_would_not_read_provider_options_is_refused(tmp_path: Path) -> None:
    flags = {"engine": "torch", "provider_option": ("use_tf32=0",)}
    options = build_options(ValidateOptions, flags)
    with pytest.raises(InputError, match="--provider-option is read by ONNX Runtime"):
        run_validate(tmp_path, options, None, "qdit-validate", Silent())


def test_an_engine_that_would_not_read_them_is_refused(tmp_path: Path) -> None:
    options = build_options(ValidateOptions, {"engine": "torch", "provider": CPU})
    with pytest.raises(InputError, match="--provider is read by ONNX Runtime, got --engine torch"):
        run_validate(tmp_path, options, None, "qdit-validate", Silent())


def test_targets_that_would_not_read_them_are_refused() -> None:
    with pytest.raises(InputError, match=r"are read by fp32, fp16, qdq, .* got --targets torch"):
        run_bench(
            "random:DiT-S/8", SchemeOptions(), targets=("torch",), provider=CPU,
            command="", progress=Silent(),
        )  # fmt: skip
