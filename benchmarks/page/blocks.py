"""Generated blocks of a Markdown page: what stands between two comments that say which table or plot it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

_BLOCK = re.compile(r"(<!-- made by benchmarks/publish\.py: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str, makers: Mapping[str, Callable[[], str]]) -> str:
    """The page with every block made again. Raises `ValueError` for a block that nobody makes, or that is not in the page."""
    names = [name for _, name, _ in _BLOCK.findall(page)]
    if sorted(names) != sorted(makers):
        raise ValueError(f"the page has blocks {sorted(names)}, and {sorted(makers)} are made")
    return _BLOCK.sub(lambda found: f"{found[1]}\n{makers[found[2]]().strip()}\n\n{found[3]}", page)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
