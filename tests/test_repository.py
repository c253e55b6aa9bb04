"""Rules that the repository as a whole keeps: what loads torch, what is public, what the tools know of."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fusion

ROOT = Path(__file__).parents[1]
PACKAGES = ("fusion", "dag", "compress", "executor", "scheduler", "worker", "coordinator")
WITHOUT_TORCH = (
    "dag.allowlist",
    "dag.cut",
    "dag.evaluation",
    "dag.graph",
    "dag.serialize",
    "dag.validate",
    "dag.views",
    "dag.workload",
    "executor.board",
    "executor.ordering",
)
MAX_TRACKED_BYTES = 2**20


def submodules(package: str) -> list[str]:
    """`package` and every module below it, without importing them."""
    folder = ROOT / package
    names = {package}
    for file in folder.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        names.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(names)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)


def test_coordinator_scheduler_and_graph_code_never_load_torch() -> None:
    modules = [*WITHOUT_TORCH, *submodules("coordinator"), *submodules("scheduler")]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(f'{name} loads torch')\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_the_command_line_answers_without_loading_torch() -> None:
    done = python("import sys, fusion, fusion.cli; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_public_names_of_fusion() -> None:
    assert fusion.__all__ == ["Client", "TrainResult", "__version__", "capture", "train"]
    for name in fusion.__all__:
        assert getattr(fusion, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fusion.nothing


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == fusion.__version__
    done = subprocess.run([sys.executable, "-m", "fusion", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"fusion {fusion.__version__}"
    assert f"## {fusion.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_say_that_they_are_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()


def test_every_module_of_fusion_stands_in_the_import_layers() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["id"] == "layers")
    listed = set(re.findall(r"fusion\.(\w+)", " ".join(layers)))
    present = {module.name for module in pkgutil.iter_modules([str(ROOT / "fusion")])}
    assert present == listed


def test_every_module_has_a_docstring() -> None:
    bare = [
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in sorted((ROOT / package).rglob("*.py"))
        if not file.read_text().lstrip().startswith('"""')
    ]
    assert not bare


def tracked_files() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_is_large() -> None:
    assert [str(file) for file in tracked_files() if file.stat().st_size > MAX_TRACKED_BYTES] == []


def test_files_that_packages_read_are_installed_with_them() -> None:
    """setuptools takes along only what a pattern of package-data names."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]["*"]
    compiled = {source for module in setuptools["ext-modules"] for source in module["sources"]}
    stray = [
        str(file)
        for file in tracked_files()
        if file.relative_to(ROOT).parts[0] in PACKAGES
        and file.suffix != ".py"
        and file.relative_to(ROOT).as_posix() not in compiled
        and not any(file.match(pattern) for pattern in patterns)
    ]
    assert not stray


def test_constraints_pin_releases_that_every_platform_has() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    assert "torch==2.13.0" in pins
    direct = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = {re.split(r"[<>=\[]", need)[0].lower().replace("_", "-") for need in direct}
    assert wanted <= {pin.split("==")[0].lower().replace("_", "-") for pin in pins}


def test_ci_runs_the_checks_and_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert {"make check", "make test", "set -euo pipefail"} <= set(script.read_text().splitlines())


def test_import_of_our_modules_has_no_side_effect_on_the_path() -> None:
    before = list(sys.path)
    for package in PACKAGES:
        importlib.import_module(package)
    assert sys.path == before
