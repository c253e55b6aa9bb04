"""The commands of README and docs: every line of a shell block as its words, comments and continuations taken away."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_FENCE = re.compile(r"^ *```(?:sh|console|bash|shell)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def shell_blocks() -> list[tuple[str, str]]:
    """(page and position, text)."""
    return [
        (f"{page.relative_to(ROOT)} block {index}", found[1])
        for page in PAGES
        for index, found in enumerate(_FENCE.finditer(page.read_text(encoding="utf-8")))
    ]


def shown_commands() -> list[str]:
    """Every command once, as it is shown but for comments."""
    found: dict[str, None] = {}
    for _, text in shell_blocks():
        for line in text.replace("\\\n", " ").splitlines():
            command = " ".join(re.sub(r"\s#.*", "", line).split()).removeprefix("$ ")
            if command and not command.startswith("#"):
                found[command] = None
    return list(found)


def words(command: str) -> list[str]:
    """The words, without `sudo` and the folder of a virtual environment."""
    split = shlex.split(command)
    split = split[1:] if split[0] == "sudo" else split
    return [split[0].removeprefix(".venv/bin/"), *split[1:]]


def fusion_arguments(command: str) -> list[str] | None:
    """What `fusion` is given, also where another program runs it in a container; None when it is not run."""
    found = words(command)
    inside = found[:1] == ["fusion"] or "exec" in found
    return found[found.index("fusion", found.index("exec") + 2 if "exec" in found else 0) + 1 :] if inside else None
