"""Writes the example as an ordinary job: a spec, a model and a text, for a person to read, change and submit again."""

from __future__ import annotations

import shutil
from hashlib import sha256
from pathlib import Path
from pydoc_data import topics

from fusion.errors import UserError


def corpus() -> str:
    """Python's language reference as this interpreter's `help()` knows it: about 460 kB of English."""
    # Mixed, but always alike: the end is held out for evaluation and should be like the rest.
    mixed = sorted(topics.topics, key=lambda key: sha256(key.encode()).digest())
    return "\n\n".join(topics.topics[key] for key in mixed)


def write_demo(folder: Path) -> Path:
    """Write `job.yaml`, `gpt.py` and `text.txt` into `folder`; returns the spec's path. Raises `UserError`."""
    here = Path(__file__).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("job.yaml", "gpt.py"):
            shutil.copyfile(here / name, folder / name)
        (folder / "text.txt").write_text(corpus(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: can't write the example: {error.strerror or error}") from None
    return folder / "job.yaml"
