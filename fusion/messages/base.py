"""What every message is: immutable, and refused with an unknown field. Words for people are cut to what anybody reads."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

_MOST_LETTERS = 2000
_MOST_DETAIL = 2**16

Words = Annotated[str, AfterValidator(lambda text: text[:_MOST_LETTERS])]
"""One line: it is kept, and shown to everybody who looks."""
Detail = Annotated[str, AfterValidator(lambda text: text[-_MOST_DETAIL:])]
"""For the log; a traceback ends with what matters."""


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
