"""What a user gets: the wheel's contents, imports without extras, commands, README and Makefile."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import qdit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CUDA_FILES = [
    "hopper_consumer.cuh",
    "hopper_copies.cuh",
    "hopper_stages.cuh",
    "hopper_sums.cuh",
    "linear.cuh",
    "linear_sm80.cu",
    "linear_sm90.cu",
    "numbers.cuh",
    "ptx.cuh",
    "quantize.cu",
    "weight_only.cu",
]
C_FILES = [
    *("custom_op.c", "multiply_amx.c", "multiply_vnni.c", "node.c", "panel.c", "plain.c"),
    *("product.c", "rows.c", "units.c", "write_rows.c"),
    *("node.h", "ort_abi.h", "panel.h", "panel_rows.h", "product.h", "rows.h", "simd.h", "sizes.h"),
    "tiles.h",
]
DATA_FILES = {
    "py.typed",
    "demo/README.md",
    "demo/features.onnx",
    "demo/reference.npz",
    "demo/scheduler/scheduler_config.json",
    "demo/transformer/config.json",
    "demo/transformer/diffusion_pytorch_model.safetensors",
    *(f"engines/cpu_kernels/c/{file}" for file in C_FILES),
    *(f"engines/kernels/cuda/{file}" for file in CUDA_FILES),
    "engines/kernels/tiles/sm_90a.json",
    "engines/report/report.css",
    "engines/report/report.html.j2",
    "serve/web/page/events.js",
    "serve/web/page/index.html",
    "serve/web/page/page.css",
    "serve/web/page/page.js",
    "serve/web/page/psnr.js",
}
OPTIONAL_MODULES = [
    "cuda",
    "fastapi",
    "httptools",
    "nncf",
    "openvino",
    "polygraphy",
    "prometheus_client",
    "ray",
    "tensorrt",
    "torchao",
    "uvicorn",
    "tritonclient",
    "ziglang",
]
# The one package that may import its extra as it is imported; everything else imports it late.
NEEDS_ITS_EXTRA = "qdit.serve.web"
FLOORS = ["calibrate", "export", "engines", "serve", "cli", "demo"]

# Run in a fresh interpreter: argv[1] names the modules to refuse, argv[2] those to import.
IMPORT_WITHOUT = """
import importlib, json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"No module named {name!r} (refused by the test)", name=name)

refused = set(json.loads(sys.argv[1]))
sys.meta_path.insert(0, Refuse())
failed = {}
for name in json.loads(sys.argv[2]):
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = repr(error)
print(json.dumps({"failed": failed, "loaded": sorted(refused & set(sys.modules))}))
"""


def package_folders(folder: Path) -> Iterator[Path]:
    """`folder` and every folder below it that is a package of a package."""
    yield folder
    for init in sorted(folder.glob("*/__init__.py")):
        if not init.parent.name.startswith("."):
            yield from package_folders(init.parent)


def python_files(root: Path) -> set[str]:
    """Every module of the package as the tree has it, as posix paths below the root."""
    return {
        path.relative_to(root).as_posix()
        for folder in package_folders(root)
        for path in folder.glob("*.py")
    }


def module_names(root: Path) -> list[str]:
    """Dotted names of the same modules."""
    paths = (Path("qdit", name).with_suffix("") for name in python_files(root))
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    settings: dict[str, Any] = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))
    return settings


@pytest.fixture(scope="module")
def wheel(
    copy_source: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_source(folder / "source")
    # the test runs without the network: setuptools comes from the dev extra
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(source)],
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("qdit-*.whl")
    return zipfile.ZipFile(path)


def wheel_files(wheel: zipfile.ZipFile) -> set[str]:
    return {name.removeprefix("qdit/") for name in wheel.namelist() if ".dist-info/" not in name}


def test_the_wheel_has_every_module_of_the_tree_and_no_other(
    wheel: zipfile.ZipFile, repository: Path
) -> None:
    built = {name for name in wheel_files(wheel) if name.endswith(".py")}
    assert built == python_files(repository), "list new packages in pyproject.toml"


def test_the_wheel_has_exactly_the_data_files_named_here(wheel: zipfile.ZipFile) -> None:
    assert {name for name in wheel_files(wheel) if not name.endswith(".py")} == DATA_FILES


def test_the_wheel_carries_the_licence(wheel: zipfile.ZipFile, repository: Path) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("licenses/LICENSE"))
    assert wheel.read(name) == (repository / "LICENSE").read_bytes()
    assert b"Apache License" in wheel.read(name)


def test_every_module_imports_without_the_optional_dependencies(repository: Path) -> None:
    names = [name for name in module_names(repository) if not name.startswith(NEEDS_ITS_EXTRA)]
    arguments = [json.dumps(OPTIONAL_MODULES), json.dumps(names)]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT, *arguments],
        check=True,
        capture_output=True,
        text=True,
        cwd=repository.parent,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {"failed": {}, "loaded": []}


def test_every_extra_but_dev_is_among_the_refused_modules(project: dict[str, Any]) -> None:
    same_import = {"onnxruntime-gpu"}  # replaces onnxruntime under the same import name
    other_import = {"cuda-bindings": "cuda"}
    extras = project["project"]["optional-dependencies"]
    names = {
        re.split(r"[\[<>=; ]", requirement)[0]
        for extra, requirements in extras.items()
        for requirement in requirements
        if extra != "dev"
    }
    modules = {other_import.get(name, name.replace("-", "_")) for name in names - same_import}
    assert modules == set(OPTIONAL_MODULES)


@pytest.mark.parametrize("floor", FLOORS)
def test_a_stray_import_of_a_floor_from_the_root_fails(floor: str, repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {floor}"], capture_output=True, text=True, cwd=repository
    )
    assert done.returncode == 1
    assert "attempted relative import beyond top-level package" in done.stderr


def test_every_declared_command_resolves_to_a_function(project: dict[str, Any]) -> None:
    declared = project["project"]["scripts"]
    installed = {
        entry.name: entry
        for entry in importlib.metadata.distribution("qdit").entry_points
        if entry.group == "console_scripts"
    }
    assert {name: entry.value for name, entry in installed.items()} == declared
    assert all(callable(entry.load()) for entry in installed.values())


def test_the_version_is_the_same_everywhere(project: dict[str, Any]) -> None:
    assert qdit.__version__ == project["project"]["version"]
    assert qdit.__version__ == importlib.metadata.version("qdit")


def make_targets(repository: Path) -> set[str]:
    return set(re.findall(r"^([a-z]+):", (repository / "Makefile").read_text("utf-8"), re.M))


def test_the_first_two_commands_of_the_readme_exist(
    repository: Path, project: dict[str, Any]
) -> None:
    readme = (repository / "README.md").read_text("utf-8")
    block = re.search(r"```\w*\n(.*?)```|((?:^    \S.*\n)+)", readme, re.S | re.M)
    assert block is not None, "README.md has no code block"
    lines = (block[1] or block[2]).splitlines()
    commands = [line.partition("#")[0].split() for line in lines]
    commands = [command for command in commands if command][:2]
    assert len(commands) == 2
    for program, *arguments in commands:
        program = program.removeprefix(".venv/bin/")
        if program == "make":
            assert arguments[0] in make_targets(repository)
        else:
            assert program in project["project"]["scripts"]


def test_ci_runs_the_same_target_as_a_developer(repository: Path) -> None:
    script = repository / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert re.search(r"^make test$", script.read_text("utf-8"), re.M)
    assert {"demo", "test", "lint", "types", "clean"} <= make_targets(repository)
