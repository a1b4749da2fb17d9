"""A forward pass without its launch costs: captured once as a CUDA graph, replayed after that."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Arguments by position or name.
_Arguments = Mapping[int | str, Any]


@dataclass(frozen=True)
class _Capture:
    graph: torch.cuda.CUDAGraph
    inputs: dict[int | str, Tensor]
    outputs: tuple[Tensor, ...]


class GraphedForward:
    """A `forward` that returns a tuple of tensors, on CUDA; one graph for each set of shapes.

    The kernels are those of the eager forward in the same order, so the results are the same to the
    bit. A graph holds addresses: parameters may change in place only. `state` tells what else the
    forward depends on; where it differs from the last call's, the graphs are captured anew.
    """

    def __init__(
        self, forward: Callable[..., tuple[Tensor, ...]], state: Callable[[], Hashable]
    ) -> None:
        self._forward = forward
        self._state = state
        self._captured_in = state()
        self._captures: dict[Hashable, _Capture] = {}
        self._last: _Capture | None = None  # its memory serves the next capture

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        if (state := self._state()) != self._captured_in:
            self._captures.clear()
            self._captured_in = state
        arguments: dict[int | str, Any] = dict(enumerate(args))
        arguments.update(kwargs)
        key = _key(arguments)
        capture = self._captures.get(key)
        if capture is None:
            capture = self._captures[key] = self._last = self._capture(arguments)
        for name, own in capture.inputs.items():
            own.copy_(arguments[name])
        capture.graph.replay()
        return tuple(output.clone() for output in capture.outputs)  # the next replay overwrites it

    def _capture(self, arguments: _Arguments) -> _Capture:
        own = {name: value.clone() for name, value in arguments.items() if _is_tensor(value)}
        with torch.cuda.device(next(iter(own.values())).device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles and loads kernels, which a capture may not
                self._run(arguments, own)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            pool = None if self._last is None else self._last.graph.pool()
            with torch.cuda.graph(graph, pool=pool):
                outputs = self._run(arguments, own)
        return _Capture(graph, own, outputs)

    def _run(self, arguments: _Arguments, own: Mapping[int | str, Tensor]) -> tuple[Tensor, ...]:
        given = {**arguments, **own}
        positional = [given[name] for name in given if isinstance(name, int)]
        named = {name: value for name, value in given.items() if isinstance(name, str)}
        return self._forward(*positional, **named)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _key(arguments: _Arguments) -> Hashable:
    return tuple(
        (name, value.shape, value.dtype, value.device) if _is_tensor(value) else (name, value)
        for name, value in arguments.items()
    )
