"""Writes the generated pages and drawings of `docs/` (job spec from the pydantic models, commands from the typer app, the HTTP
and Python APIs from routes and signatures) and the README's example, which is a file that the tests run.

`python docs/generate_reference.py` writes them; with `--check` it only says which ones are out of date (exit code 1).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS), str(ROOT)]

import draw_concepts  # noqa: E402
import draw_overview  # noqa: E402
import reference_cli  # noqa: E402
import reference_http  # noqa: E402
import reference_python  # noqa: E402
import reference_spec  # noqa: E402

EXAMPLE = "examples/train_in_15_lines.py"


def readme() -> str:
    """The README with the example's code in the block after the comment that names it."""
    text = (ROOT / "README.md").read_text()
    code = (ROOT / EXAMPLE).read_text().rstrip()
    block = re.compile(rf"(<!-- {re.escape(EXAMPLE)}:.*?-->\n```python\n).*?(```)", re.DOTALL)
    written, count = block.subn(lambda found: f"{found[1]}{code}\n{found[2]}", text)
    if count != 1:
        raise SystemExit(f"README.md has {count} code blocks for {EXAMPLE}, expected one")
    return written


PAGES = {
    "docs/job-spec.md": reference_spec.page,
    "docs/cli.md": reference_cli.page,
    "docs/http-api.md": reference_http.page,
    "docs/python-reference.md": reference_python.page,
    "docs/overview.svg": draw_overview.picture,
    "docs/images/cutting.svg": draw_concepts.cutting,
    "docs/images/one_step.svg": draw_concepts.pipeline,
    "docs/images/recovery.svg": draw_concepts.recovery,
    "README.md": readme,
}


def main(arguments: list[str]) -> int:
    check = "--check" in arguments
    stale: list[str] = []
    for name, page in PAGES.items():
        path = ROOT / name
        text = page()
        if path.exists() and path.read_text() == text:
            continue
        stale.append(name)
        if not check:
            path.write_text(text)
            print(f"wrote {name}")
    if check and stale:
        print(f"out of date: {', '.join(stale)}. Run `make docs` and commit.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
