"""Record the members of TensorRT's real Python bindings, for the fake module of the tests.

    python record.py OUTPUT.json [--package tensorrt_bindings --path FOLDER --preload LIB …]

Run by hand for a new TensorRT: the bindings' wheel is enough where the shared libraries are stood
in for (`tests/engines/tensorrt/shim.py`). Recorded here: 8.6.0 (its own wheel), 10.0.1, 10.16.1
and 11.4.0 (bindings' wheels). Layers (ILayer, LayerType) were added later, and are recorded of
8.6.0 alone: no code here looks at the layers of a strongly typed network.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import re
import sys
from pathlib import Path

CLASSES = (
    "Builder", "IBuilderConfig", "INetworkDefinition", "OnnxParser", "ParserError", "Runtime",
    "ICudaEngine", "IExecutionContext", "IOptimizationProfile", "ITimingCache", "EngineInspector",
    "IProgressMonitor", "IHostMemory", "Logger", "ILogger", "ITensor", "ILayer",
)  # fmt: skip
ENUMS = (
    "BuilderFlag", "NetworkDefinitionCreationFlag", "OnnxParserFlag", "HardwareCompatibilityLevel",
    "ProfilingVerbosity", "MemoryPoolType", "TacticSource", "LayerInformationFormat", "DataType",
    "TensorIOMode", "TensorFormat", "TensorLocation", "PreviewFeature", "EngineCapability",
    "LayerType",
)  # fmt: skip
FUNCTIONS = (
    "init_libnvinfer_plugins",
    "get_plugin_registry",
    "get_builder_plugin_registry",
    "volume",
    "nptype",
)


def parameters(document: str | None) -> list[list[str]] | None:
    """Parameter names of each overload, from pybind11's docstring; None where it says nothing."""
    found = []
    for line in (document or "").splitlines():
        match = re.match(r"^(?:\d+\. )?\w+\((.*)\) ->", line.strip())
        if match:
            found.append([_name(parameter) for parameter in _split(match[1])])
    return found or None


def _name(parameter: str) -> str:
    """'flags: int = 0' → 'flags=', which marks what may be left out."""
    name = parameter.split(":")[0].split("=")[0].strip()
    return f"{name}=" if re.search(r" = |=", parameter) else name


def _split(text: str) -> list[str]:
    """A parameter list at its outer commas."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "[(<") - (character in "])>")
        if character == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def record(module: object) -> dict[str, object]:
    classes = {}
    for name in CLASSES:
        cls = getattr(module, name, None)
        if cls is not None:
            classes[name] = {
                member: parameters(getattr(cls, member).__doc__)
                if callable(getattr(cls, member))
                else "property"
                for member in sorted(dir(cls))
                if not member.startswith("_") or member == "__init__"
            }
    enums = {
        name: sorted(getattr(module, name).__members__) for name in ENUMS if hasattr(module, name)
    }
    functions = [name for name in FUNCTIONS if hasattr(module, name)]
    return {
        "version": module.__version__,  # type: ignore[attr-defined]
        "classes": classes,
        "enums": enums,
        "functions": functions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--package", default="tensorrt")
    parser.add_argument("--path", default=".")
    parser.add_argument("--preload", nargs="*", default=[])
    given = parser.parse_args()
    for library in given.preload:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, given.path)
    found = record(importlib.import_module(given.package))
    given.output.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
