"""Copies of checkpoints at a URL, for whoever does not want them on the coordinator's disk alone.

::

    URL/JOB/STEP/optimizer.safetensors, model.safetensors, checkpoint.json

`checkpoint.json` has sizes and hashes of the other two, and is written last: without it a copy is not whole. Everything here
blocks; it is called from a thread.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from coordinator.storage.checkpoints import MODEL_FILE, OPTIMIZER_FILE, Checkpoint, Checkpoints
from fusion.remote_files import RemoteFolder

MANIFEST = "checkpoint.json"


class Copies:
    """What `files` has, at `url`. Raises `UserError` when that can't be used."""

    def __init__(self, url: str, files: Checkpoints) -> None:
        self._there = RemoteFolder(url)
        self._files = files

    def where(self, job: str, step: int) -> str:
        return f"{self._there}/{job}/{step}"

    def has(self, job: str, step: int) -> bool:
        """Whether there is a whole copy."""
        return self._there.has(f"{job}/{step}/{MANIFEST}")

    def write(self, found: Checkpoint) -> None:
        """Raises `UserError`."""
        folder, name = self._files.folder(found.job, found.step), f"{found.job}/{found.step}"
        for file in (OPTIMIZER_FILE, MODEL_FILE):
            self._there.put(folder / file, f"{name}/{file}")
        manifest = {
            "job": found.job,
            "step": found.step,
            "model": found.model.model_dump(),
            "optimizer": found.optimizer.model_dump(),
        }
        with tempfile.TemporaryDirectory(prefix="fusion-") as temporary:
            written = Path(temporary) / MANIFEST
            written.write_text(json.dumps(manifest))
            self._there.put(written, f"{name}/{MANIFEST}")

    def remove(self, job: str, step: int) -> None:
        """Raises `UserError`."""
        self._there.remove(f"{job}/{step}")
