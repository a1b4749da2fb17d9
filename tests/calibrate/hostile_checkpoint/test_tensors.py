"""A hostile weights.safetensors: sizes, header, tensors, numbers."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qdit.calibrate import artifact_errors as errors
from qdit.calibrate import tensor_file
from qdit.calibrate.schemes import LayerScheme
from qdit.errors import ArtifactError

Json = dict[str, Any]
Q0 = "transformer_blocks.0.attn1.to_q"
SCALE, PACKED = f"{Q0}.weight.scale", f"{Q0}.weight.packed"


def drop_shape(header: Json) -> None:
    del header[PACKED]["shape"]


def set_entry(name: str, **fields: Any) -> Callable[[Json], None]:
    def change(header: Json) -> None:
        header[name] = header[name] | fields

    return change


class TestTensorFile:
    @pytest.mark.usefixtures("nothing_mapped")
    @pytest.mark.parametrize("kept", [0, 4, 8, 200, -1], ids=str)
    def test_it_is_truncated(self, victim: Any, kept: int) -> None:
        data = victim.weights_path.read_bytes()
        victim.weights_path.write_bytes(data[:kept])
        victim.refuse(errors.TruncatedFileError, r"must have \d+ bytes by qdit\.json, got \d+")

    @pytest.mark.usefixtures("nothing_mapped")
    @pytest.mark.parametrize(
        ("kept", "match"),
        [(8, r"claims a header of \d+ bytes, only 0 follow"), (-1, "the file has")],
        ids=str,
    )
    def test_it_is_truncated_and_sealed(self, victim: Any, kept: int, match: str) -> None:
        victim.put_data(victim.weights_path.read_bytes()[:kept])
        victim.refuse(errors.TruncatedFileError, match)

    @pytest.mark.usefixtures("nothing_mapped")
    def test_it_is_longer_than_the_manifest_says(self, victim: Any) -> None:
        with victim.weights_path.open("ab") as handle:
            handle.write(b"\0")
        victim.refuse(errors.SizeMismatchError, r"must have \d+ bytes by qdit\.json, got \d+")

    @pytest.mark.usefixtures("nothing_mapped")
    def test_it_has_a_tail_that_no_tensor_covers(self, victim: Any) -> None:
        victim.put_data(victim.weights_path.read_bytes() + b"\0")
        victim.refuse(errors.SizeMismatchError, r"the tensors take \d+ bytes, the file has \d+")

    @pytest.mark.parametrize("place", [-1, -1000], ids=str)
    def test_one_bit_was_flipped(self, victim: Any, place: int) -> None:
        data = bytearray(victim.weights_path.read_bytes())
        data[place] ^= 1
        victim.weights_path.write_bytes(data)
        victim.refuse(errors.HashMismatchError, r"SHA-256 differs.*export the model again")

    def test_it_belongs_to_another_checkpoint(
        self, victim: Any, make_quantized: Callable[..., Any], tmp_path: Path
    ) -> None:
        scheme = LayerScheme(4, 8, "channel", "token")
        layers = {Q0: LayerScheme(3, 8, "channel", "token", False, False)}
        other = make_quantized(scheme, layers, attention_head_dim=18, seed=1).checkpoint
        other.write(tmp_path / "other")
        shutil.copy(tmp_path / "other" / "weights.safetensors", victim.folder)
        victim.refuse(errors.HashMismatchError, "is not the file that .* was written for")

    @pytest.mark.usefixtures("nothing_mapped")
    @pytest.mark.parametrize(
        ("length", "error", "match"),
        [
            (2**64 - 1, errors.FileTooLargeError, "it claims 18446744073709551615"),
            ((16 << 20) + 1, errors.FileTooLargeError, "may have 16777216 bytes, it claims"),
            (1 << 20, errors.TruncatedFileError, "claims a header of 1048576 bytes"),
            (0, errors.InvalidHeaderError, r"must begin with '\{', got b''"),
            (20, errors.InvalidJsonError, "is not readable JSON"),
        ],
        ids=["2^64 - 1", "over the limit", "over the file", "0", "cuts the JSON"],
    )
    def test_its_header_length_lies(
        self, victim: Any, length: int, error: type[ArtifactError], match: str
    ) -> None:
        data = victim.weights_path.read_bytes()
        victim.put_data(struct.pack("<Q", length) + data[8:])
        victim.refuse(error, match)

    @pytest.mark.usefixtures("nothing_mapped")
    def test_a_tensor_stands_twice(self, victim: Any) -> None:
        data = victim.weights_path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        twice = {PACKED: header[PACKED]}
        text = json.dumps(header)[:-1].encode() + b"," + json.dumps(twice)[1:].encode()
        victim.put_data(struct.pack("<Q", len(text)) + text + data[end:])
        victim.refuse(errors.DuplicateKeyError, rf"names the key '{PACKED}' twice")

    @pytest.mark.usefixtures("nothing_mapped")
    @pytest.mark.parametrize(
        ("change", "error", "match"),
        [
            (lambda h: list(h), errors.InvalidHeaderError, r"must begin with '\{', got"),
            (
                lambda h: h.update(__metadata__={"a": 1}),
                errors.InvalidHeaderError,
                "__metadata__ must map strings to strings",
            ),
            (
                lambda h: h.update(__metadata__=[]),
                errors.InvalidHeaderError,
                "__metadata__ must map strings to strings",
            ),
            (lambda h: h.update({PACKED: 1}), errors.InvalidHeaderError, "exactly the keys"),
            (set_entry(PACKED, extra=1), errors.InvalidHeaderError, "exactly the keys dtype"),
            (drop_shape, errors.InvalidHeaderError, "exactly the keys"),
            (set_entry(PACKED, shape=[36, -14]), errors.InvalidHeaderError, "whole numbers"),
            (set_entry(PACKED, shape=[36.0, 14]), errors.InvalidHeaderError, "whole numbers"),
            (set_entry(PACKED, shape="36"), errors.InvalidHeaderError, "whole numbers"),
            (set_entry(PACKED, shape=[True, 504]), errors.InvalidHeaderError, "whole numbers"),
            (set_entry(PACKED, data_offsets=[0]), errors.InvalidHeaderError, "whole numbers"),
            (set_entry(PACKED, data_offsets=[-504, 0]), errors.InvalidHeaderError, "whole"),
            (set_entry(PACKED, dtype="I4"), errors.WrongDtypeError, "F32, F16, U8, got 'I4'"),
            (set_entry(PACKED, dtype="BF16"), errors.WrongDtypeError, "got 'BF16'"),
            (set_entry(PACKED, dtype=["U8"]), errors.WrongDtypeError, r"got \['U8'\]"),
            (set_entry(PACKED, dtype=None), errors.WrongDtypeError, "got None"),
            (set_entry(PACKED, shape=[36, 15]), errors.SizeMismatchError, "takes 540 bytes"),
            (set_entry(PACKED, shape=[2**62] * 8), errors.SizeMismatchError, "its offsets span"),
            (set_entry(PACKED, shape=[2**63, 1]), errors.InvalidHeaderError, "whole numbers"),
            (set_entry(PACKED, shape=[2] * 99), errors.InvalidHeaderError, "8 dimensions, it has"),
            (set_entry(PACKED, data_offsets=[9, 3]), errors.SizeMismatchError, "offsets span -6"),
            (set_entry(PACKED, data_offsets=[0, 504]), errors.SizeMismatchError, "must begin at"),
            (
                set_entry(PACKED, data_offsets=[2**60, 2**60 + 504]),
                errors.SizeMismatchError,
                "must begin at byte",
            ),
        ],
        ids=[
            "list",
            "metadata value",
            "metadata list",
            "entry no object",
            "entry extra key",
            "entry lacks shape",
            "negative shape",
            "float shape",
            "text shape",
            "bool shape",
            "one offset",
            "negative offset",
            "dtype I4",
            "dtype BF16",
            "dtype list",
            "dtype null",
            "shape too large",
            "shape enormous",
            "shape over 64 bits",
            "99 dimensions",
            "offsets reversed",
            "offsets overlap",
            "offsets beyond the file",
        ],
    )
    def test_its_header_lies(
        self,
        victim: Any,
        change: Callable[[Json], object],
        error: type[ArtifactError],
        match: str,
    ) -> None:
        victim.change_header(change)
        victim.refuse(error, match)

    def test_metadata_of_others_is_fine(self, victim: Any) -> None:
        victim.change_header(lambda header: header.update(__metadata__={"format": "pt"}))
        assert victim.read().weights[Q0].bits == 3

    @pytest.mark.usefixtures("nothing_mapped")
    def test_white_space_before_the_header_is_against_the_format(self, victim: Any) -> None:
        data = victim.weights_path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        victim.put_data(struct.pack("<Q", length + 8) + b" " * 8 + data[8:])
        victim.refuse(errors.InvalidHeaderError, r"must begin with '\{', got b' +'")

    def test_what_the_library_alone_refuses_has_a_name_too(
        self, victim: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_args: object, **_options: object) -> None:
            raise RuntimeError("a rule of its own")

        monkeypatch.setattr(tensor_file, "safe_open", fail)
        victim.refuse(errors.InvalidHeaderError, "is no safetensors file: a rule of its own")


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return apply


def filled(value: float) -> Callable[[Tensor], Tensor]:
    """The first element set to `value`."""

    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


class TestTensors:
    @pytest.mark.usefixtures("nothing_mapped")
    @pytest.mark.parametrize(
        ("change", "error", "match"),
        [
            (lambda t: t.pop(PACKED), errors.MissingTensorError, rf"lacks the tensor {PACKED}"),
            (lambda t: t.pop("proj_out_1.bias"), errors.MissingTensorError, "proj_out_1.bias"),
            (
                lambda t: t.update(surprise=torch.zeros(1)),
                errors.UnknownTensorError,
                "has the tensor surprise, which the model and its plan do not call for",
            ),
            (
                lambda t: t.update({f"{Q0}.weight": torch.zeros(36, 36)}),
                errors.UnknownTensorError,
                rf"has the tensor {Q0}\.weight,",
            ),
            (replaced(SCALE, Tensor.float), errors.WrongDtypeError, "must be F16, got F32"),
            (
                replaced(PACKED, Tensor.half),
                errors.WrongDtypeError,
                "must be U8, got F16",
            ),
            (
                replaced("proj_out_1.bias", lambda t: t.view(torch.uint8)),
                errors.WrongDtypeError,
                "must be F16 or F32, got U8",
            ),
            (
                replaced(PACKED, Tensor.t),
                errors.ShapeMismatchError,
                r"must have shape \[36, 14\] by config and plan, got \[14, 36\]",
            ),
            (replaced(SCALE, Tensor.flatten), errors.ShapeMismatchError, r"\[36, 1\] .* \[36\]"),
            (
                replaced("proj_out_2.weight", lambda t: t[:-1]),
                errors.ShapeMismatchError,
                "tensor proj_out_2.weight must have shape",
            ),
            (
                replaced("proj_out_2.weight", lambda t: t[:0]),
                errors.ShapeMismatchError,
                "tensor proj_out_2.weight must have shape",
            ),
        ],
        ids=[
            "packed missing",
            "parameter missing",
            "unknown",
            "unquantized too",
            "scale F32",
            "packed F16",
            "parameter U8",
            "transposed",
            "flat scale",
            "short",
            "empty",
        ],
    )
    def test_they_are_not_those_called_for(
        self,
        victim: Any,
        change: Callable[[dict[str, Tensor]], object],
        error: type[ArtifactError],
        match: str,
    ) -> None:
        victim.change_tensors(change)
        victim.refuse(error, match)

    def test_a_name_cannot_write_on_the_terminal(self, victim: Any) -> None:
        victim.change_tensors(lambda tensors: tensors.update({"a\n\x1b[2Jb": torch.zeros(1)}))
        victim.refuse(errors.UnknownTensorError, r"has the tensor a\\n\\x1b\[2Jb, which")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
    @pytest.mark.parametrize("name", [SCALE, "proj_out_1.bias"])
    def test_they_hold_what_is_no_number(self, victim: Any, name: str, value: float) -> None:
        victim.change_tensors(replaced(name, filled(value)))
        victim.refuse(errors.NonFiniteError, "must be finite")

    @pytest.mark.parametrize("value", [0.0, -0.0, -0.5], ids=str)
    def test_a_scale_is_not_positive(self, victim: Any, value: float) -> None:
        victim.change_tensors(replaced(SCALE, filled(value)))
        victim.refuse(errors.ScaleRangeError, rf"the scales of {Q0} must be positive, got")

    @pytest.mark.parametrize("part", ["packed", "zero_point"])
    def test_padding_is_not_zero(self, victim: Any, part: str) -> None:
        # 36 three-bit values take 108 bits: the upper half of the last byte is padding
        def spoil(tensor: Tensor) -> Tensor:
            tensor.view(-1)[-1] |= 0x10
            return tensor

        victim.change_tensors(replaced(f"{Q0}.weight.{part}", spoil))
        victim.refuse(errors.PaddingError, rf"padding bits of {Q0}\.weight\.{part} must be 0")

    def test_a_parameter_in_float32_is_fine(self, victim: Any) -> None:
        victim.change_tensors(replaced("proj_out_1.bias", Tensor.float))
        checkpoint = victim.read()
        assert checkpoint.parameters["proj_out_1.bias"].dtype == torch.float32
