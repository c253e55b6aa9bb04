"""Text to tokens: bytes are their own tokens, or a `tokenizers` file says how."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fusion.data.prepared import TOKENS, RawData
from fusion.errors import DataError
from fusion.spec import TextData


def read_text(spec: TextData, base: Path) -> RawData:
    """Read and tokenise a text file. Raises `DataError`."""
    path = base / spec.text
    where = f"data.text {path}"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{where}: no such file") from None
    except OSError as error:
        raise DataError(f"{where}: can't be read: {error.strerror or error}") from None
    return tokens_of(tokenize(content, spec.tokenizer, base, where), spec.sequence_length, where, spec.holdout)


def tokens_of(tokens: Tensor, sequence_length: int, where: str, holdout: float) -> RawData:
    """1-D int64 tokens as data; each sample needs one token more than its length, for the last target."""
    if len(tokens) < sequence_length + 1:
        raise DataError(
            f"{where}: {len(tokens)} tokens, but one sample of sequence_length {sequence_length} needs "
            f"{sequence_length + 1}; give more text, or a smaller data.sequence_length"
        )
    return RawData("tokens", {TOKENS: tokens}, where, holdout, sequence_length)


def tokenize(content: bytes, tokenizer: str, base: Path, where: str) -> Tensor:
    """Tokens of `content`, shape (tokens,), int64. Raises `DataError`."""
    if tokenizer == "bytes":
        return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).astype(np.int64))
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start}); convert it, or use tokenizer: bytes") from None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DataError(
            "data.tokenizer: a tokenizer file needs the `tokenizers` package; pip install 'fusion-train[hf]'"
        ) from None
    path = base / tokenizer
    if not path.is_file():
        raise DataError(f"data.tokenizer: no such file: {path}; give a `tokenizers` JSON file, or `bytes`")
    try:
        encoder = Tokenizer.from_file(str(path))
    except Exception as error:
        raise DataError(f"data.tokenizer {path}: not a `tokenizers` JSON file: {str(error).splitlines()[0]}") from None
    return torch.tensor(encoder.encode(text, add_special_tokens=False).ids, dtype=torch.int64)
