"""Stops an install that would bring several gigabytes of CUDA libraries to a Linux machine without an NVIDIA GPU.

pip's default build of torch for Linux depends on them. Asks pip what it would install for the torch of constraints.txt,
with the same index options as the install that follows, and says what to do instead. Needs nothing but pip.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata


def cuda_packages(index_options: list[str]) -> list[str]:
    """Names of the CUDA packages that pip would install along with torch."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--dry-run",
        "--no-deps",
        "--quiet",
    ]
    command += ["--ignore-installed", "--report", "-", "-c", "constraints.txt", *index_options, "torch"]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    report = json.loads(answer.stdout)
    needs = [line for package in report["install"] for line in package["metadata"].get("requires_dist", [])]
    names = {line.split(";")[0].split("[")[0].split("=")[0].split("<")[0].split(">")[0].strip() for line in needs}
    return sorted(name for name in names if name.startswith(("nvidia-", "cuda-")))


def main() -> int:
    try:
        metadata.version("torch")
        return 0  # what is there was somebody's choice; pip keeps it if it fits the constraints
    except metadata.PackageNotFoundError:
        pass
    if not sys.platform.startswith("linux") or shutil.which("nvidia-smi") or os.environ.get("ALLOW_CUDA"):
        return 0
    if found := cuda_packages(sys.argv[1:]):
        print(
            f"pip would install a torch that needs {len(found)} CUDA packages, and this machine has no NVIDIA GPU. "
            "Give the index of PyTorch's CPU builds (see PyTorch's page 'Get started') with `make TORCH_INDEX=URL ...`, "
            "or install torch 2.13.0 into .venv yourself, or set ALLOW_CUDA=1 to go on.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
