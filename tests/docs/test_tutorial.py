"""The tutorial's files and commands, as they stand on the page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")


def block(file: str) -> str:
    """The code block that follows the mention of a file's name at the end of a line."""
    found = re.search(rf"`{re.escape(file)}`:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None, file
    return found[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("model.py", "job.yaml", "cities.yaml"):
        (tmp_path / name).write_text(block(name), encoding="utf-8")
    return tmp_path


def run(folder: Path, command: str) -> str:
    """Run a command that the page shows; its output."""
    assert f"\n{command}\n" in PAGE
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def pace(out: str) -> float:
    """Samples a second."""
    found = re.search(r"([\d,.]+) samples/s", out)
    assert found is not None, out
    return float(found[1].replace(",", ""))


@pytest.mark.slow
def test_the_tutorial(folder: Path) -> None:
    assert "8,970" in run(folder, "fusion dag job.yaml")
    out = run(folder, "fusion up job.yaml --workers 3 --state run --metrics metrics.jsonl")
    assert "digits is trained: 60 steps" in out
    assert (folder / "run" / "checkpoint" / "model.safetensors").exists()
    losses = [json.loads(line).get("loss") for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < 0.5 * losses[0]
    plan = re.search("`(plan: .*?)`", PAGE)
    assert plan is not None
    with open(folder / "job.yaml", "a", encoding="utf-8") as job:
        job.write(f"{plan[1]}\n")
    assert "op-fence" in run(folder, "fusion plan job.yaml --topology cities.yaml --compare")
    slow = run(folder, "fusion up job.yaml --topology cities.yaml --state slow")
    assert re.search(r"traffic +[1-9][0-9.]* MiB between 3 workers", slow)
    assert pace(slow) < pace(out)


def test_the_site_has_every_page() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(entries: list[object]) -> list[str]:
        found = []
        for entry in entries:
            for value in entry.values() if isinstance(entry, dict) else [entry]:
                found += pages(value) if isinstance(value, list) else [value]
        return found

    listed = pages(site["nav"])
    assert sorted(listed) == sorted({page.name for page in (ROOT / "docs").glob("*.md")} | {"adr/README.md"})
