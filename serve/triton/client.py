"""A denoiser on a Triton server as an engine: the project's sampling loop runs on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...engines.engine import Arrays, LoadedEngine, TensorSpec, check_inputs
from ...engines.engine import as_denoiser as wrap_as_denoiser
from ...errors import InputError, StepError

if TYPE_CHECKING:
    from ...calibrate.families.base import Denoiser, Family

_BATCH = "batch"


class TritonEngine(LoadedEngine):
    """The model `name` of the server at `address` ('localhost:8000'), by HTTP.

    A call of more samples than the model's `max_batch` goes out in parts. Raises `InputError`
    where the server or the model cannot be reached. Needs `tritonclient` (`qdit[triton]`).
    """

    def __init__(self, address: str, name: str, *, timeout_s: float = 120.0) -> None:
        try:
            from tritonclient import http
        except ImportError as error:
            raise InputError(
                f"a Triton client needs {error.name}; install it with `pip install qdit[triton]`"
            ) from error
        self._http: Any = http
        self._errors = (OSError, http.InferenceServerException)
        self.name = name
        self._client: Any = http.InferenceServerClient(
            address, connection_timeout=timeout_s, network_timeout=timeout_s
        )
        try:
            metadata = self._client.get_model_metadata(name)
            config = self._client.get_model_config(name)
        except self._errors as error:
            self.close()
            raise InputError(
                f"no model {name!r} answers at {address}: {error}; start tritonserver with "
                "--model-repository, or name another --address"
            ) from error
        self.max_batch = int(config["max_batch_size"])
        tensors = config["input"] + config["output"]
        self._single = {entry["name"] for entry in tensors if "reshape" in entry}
        self._inputs = tuple(self._spec(entry) for entry in metadata["inputs"])
        self._outputs = tuple(self._spec(entry) for entry in metadata["outputs"])

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """All outputs by name. Raises `InputError` for inputs that do not fit, `StepError` where
        the server fails."""
        check_inputs(self._inputs, inputs)
        count = next(iter(inputs.values())).shape[0]
        parts = [
            self._call(
                {name: array[start : start + self.max_batch] for name, array in inputs.items()}
            )
            for start in range(0, count, self.max_batch)
        ]
        return {
            spec.name: np.concatenate([part[spec.name] for part in parts]) for spec in self._outputs
        }

    def as_denoiser(self, family: Family, config: dict[str, Any]) -> Denoiser:
        """This engine for the sampling loop; `config` is the denoiser's."""
        return wrap_as_denoiser(self, family, config)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _call(self, inputs: Arrays) -> dict[str, np.ndarray]:
        given = []
        for spec in self._inputs:
            array = np.ascontiguousarray(inputs[spec.name])
            if spec.name in self._single:
                array = array[:, None]
            tensor = self._http.InferInput(spec.name, list(array.shape), _type_of(array.dtype))
            tensor.set_data_from_numpy(array)
            given.append(tensor)
        try:
            answer = self._client.infer(self.name, given)
        except self._errors as error:
            raise StepError(f"the Triton model {self.name} failed: {error}") from error
        made = {spec.name: answer.as_numpy(spec.name) for spec in self._outputs}
        return {name: made[name][:, 0] if name in self._single else made[name] for name in made}

    def _spec(self, entry: dict[str, Any]) -> TensorSpec:
        from tritonclient.utils import triton_to_np_dtype

        shape = () if entry["name"] in self._single else tuple(entry["shape"][1:])
        return TensorSpec(
            entry["name"], np.dtype(triton_to_np_dtype(entry["datatype"])), (_BATCH, *shape)
        )


def _type_of(dtype: np.dtype[Any]) -> str:
    from tritonclient.utils import np_to_triton_dtype

    name: str = np_to_triton_dtype(dtype)
    return name
