"""Text from a Hugging Face dataset (extra `hf`)."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from fusion.data.prepared import RawData
from fusion.data.text import tokenize, tokens_of
from fusion.errors import DataError, one_line
from fusion.progress import counting
from fusion.spec import HuggingFaceData


def read_hugging_face(spec: HuggingFaceData, base: Path) -> RawData:
    """Load a dataset, join its text column and tokenise it. Raises `DataError`."""
    where = f"data.hf {spec.hf!r}"
    try:
        import datasets
    except ImportError:
        raise DataError(f"{where}: needs the `datasets` package; pip install 'fusion-train[hf]'") from None
    local = base / spec.hf
    try:
        rows: Any = datasets.load_dataset(str(local) if local.exists() else spec.hf, spec.config, split=spec.split)
    except Exception as error:
        raise DataError(f"{where}: can't load split {spec.split!r}: {one_line(error)}") from error
    columns = list(getattr(rows, "column_names", None) or [])
    if columns and spec.column not in columns:
        raise DataError(f"{where}: has no column {spec.column!r}; it has {', '.join(columns)}")
    total = len(rows) if spec.limit is None else min(spec.limit, len(rows))
    texts = []
    for index, row in enumerate(counting(islice(rows, spec.limit), "reading dataset", total)):
        if not isinstance(row[spec.column], str):
            raise DataError(f"{where}: row {index}: column {spec.column!r} is not text")
        texts.append(row[spec.column])
    content = "\n".join(texts).encode("utf-8")
    return tokens_of(tokenize(content, spec.tokenizer, base, where), spec.sequence_length, where, spec.holdout)
