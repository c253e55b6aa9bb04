"""Warns of an install that brings several gigabytes of CUDA libraries to a Linux machine without an NVIDIA GPU.

pip's default build of torch for Linux depends on them. Asks pip what it would install for the torch of constraints.txt,
with the same index options as the install that follows, and says how to avoid it. It never stops the install: `make demo`
must work on the first try. Needs nothing but pip.
"""

from __future__ import annotations

import json
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


def main() -> None:
    try:
        metadata.version("torch")
        return  # what is there was somebody's choice; pip keeps it if it fits the constraints
    except metadata.PackageNotFoundError:
        pass
    if not sys.platform.startswith("linux") or shutil.which("nvidia-smi"):
        return
    try:
        found = cuda_packages(sys.argv[1:])
    except (subprocess.CalledProcessError, ValueError, KeyError):
        return  # the install that follows says what is wrong
    if found:
        print(
            f"note: pip's build of torch brings {len(found)} CUDA packages of several gigabytes, and this machine has no "
            "NVIDIA GPU. To do without them, stop here (Ctrl-C) and give the index of PyTorch's CPU builds (see PyTorch's "
            "page 'Get started'): make TORCH_INDEX=URL ...",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
