"""Full precision in a proof: in memory while something runs it, put away in between.

A large model on a CPU would otherwise lie beside the simulation and the runtime's session, and
their sum would be the proof's peak.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..calibrate.model import DiffusionModel
from ..errors import InputError
from ..memory import release_memory

# Below this many bytes of parameters, reading them again costs more than they are worth.
LEAST_BYTES = 1 << 30


class FullPrecision:
    """The full-precision model and how to load it again.

    `model` is one object throughout, with its name, config, shapes and device; only the weights of
    its denoiser come and go, for a model on a CPU with at least `least_bytes` of them.
    """

    def __init__(
        self, load: Callable[[], DiffusionModel], *, least_bytes: int = LEAST_BYTES
    ) -> None:
        self._load = load
        self._least_bytes = least_bytes
        self.model = load()
        self.is_away = False

    def put_away(self) -> None:
        """Free the denoiser's weights; it refuses to run until `bring_back`.

        1. A model on a GPU, or a small one: kept as it is.
        2. Otherwise each parameter keeps its shape, dtype, device and ties, and one element.
        """
        if self.is_away or self.model.device.type != "cpu" or self._bytes() < self._least_bytes:
            return
        _drop_weights(self.model.denoiser)
        self.model.denoiser.register_forward_pre_hook(_refuse)
        self.is_away = True
        release_memory()

    def bring_back(self) -> None:
        """Load the weights again, if they were put away.

        Raises `InputError` where the model's files are no longer those that it came from.
        """
        if not self.is_away:
            return
        again = self._load()
        if again.source != self.model.source:
            raise InputError(
                f"{self.model.source.location} changed while it was compared "
                f"(SHA-256 {again.source.sha256[:12]}, before {self.model.source.sha256[:12]}); "
                "run the command again"
            )
        self.model.denoiser = again.denoiser
        self.is_away = False

    def _bytes(self) -> int:
        return sum(value.nbytes for value in self.model.denoiser.parameters())


def _drop_weights(denoiser: nn.Module) -> None:
    kept = list(denoiser.named_parameters(remove_duplicate=False))
    # by identity, so that tied parameters stay tied (`kept` keeps every identity taken)
    stand_ins = {
        id(value): nn.Parameter(value.detach().new_zeros(()).expand(value.shape), False)
        for _, value in kept
    }
    for name, value in kept:
        path, _, attribute = name.rpartition(".")
        denoiser.get_submodule(path).register_parameter(attribute, stand_ins[id(value)])


def _refuse(_module: nn.Module, _inputs: Any) -> None:
    raise RuntimeError("full precision was put away; bring it back before running it")
