"""Writes the generated pages of `docs/`: the job spec from the pydantic models, the commands from the typer app.

`python docs/generate_reference.py` writes them; with `--check` it only says which ones are out of date (exit code 1).
"""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

import reference_cli  # noqa: E402
import reference_spec  # noqa: E402

PAGES = {"job-spec.md": reference_spec.page, "cli.md": reference_cli.page}


def main(arguments: list[str]) -> int:
    check = "--check" in arguments
    stale: list[str] = []
    for name, page in PAGES.items():
        path = DOCS / name
        text = page()
        if path.exists() and path.read_text() == text:
            continue
        stale.append(name)
        if not check:
            path.write_text(text)
            print(f"wrote docs/{name}")
    if check and stale:
        print(
            f"out of date: {', '.join(f'docs/{name}' for name in stale)}. Run `make docs` and commit.", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
