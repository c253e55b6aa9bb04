"""The ATen overloads that a DAG may call; everything else is refused before anything runs."""

from __future__ import annotations

from pathlib import Path

ALLOWLIST_FILE = Path(__file__).with_name("allowlist.txt")

GETITEM = "py.getitem"
"""Takes one output of a multi-output call; the only target that is not an ATen overload."""

ATEN: frozenset[str] = frozenset(
    line for line in ALLOWLIST_FILE.read_text().splitlines() if line and not line.startswith("#")
)

ALLOWED: frozenset[str] = ATEN | {GETITEM}
