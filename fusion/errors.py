"""Every error that Fusion raises on purpose, grouped by what the person who meets it can do.

::

    FusionError
    ├── UserError               change what you gave us
    │   ├── SpecError           ... the job spec or topology file (carries file, line and column)
    │   ├── CaptureError        ... the model or the loss (carries the user's file and line)
    │   ├── DataError           ... the data (wrong shape, missing key, unreadable file)
    │   └── PlanError           ... the number of fragments, the pool or its memory
    ├── RefusedError            something from outside did not pass its checks; nothing was done with it
    │   ├── DagError            ... an OP-DAG (unknown operator, wrong hash, absurd size, deep nesting)
    │   ├── BlobError           ... a blob (wrong hash, truncated, too large)
    │   ├── FrameError          ... a message on the wire
    │   └── VersionError        ... a peer that speaks another protocol version
    └── ServiceError            try again, or look at the other end
        ├── CoordinatorError    ... the coordinator answered with an error
        │   └── AskAgainError   ... which may be gone in a moment
        ├── UnreachableError    ... nobody answers at this address
        └── JobFailedError      ... the job ended without success

A message is one line that says what, where, and what to do.
"""

from __future__ import annotations


def one_line(error: BaseException, most: int = 300) -> str:
    """What an exception of somebody else's says, its lines joined: the first of several often only announces the others."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


class FusionError(Exception):
    """Base of all errors that Fusion raises on purpose."""


class UserError(FusionError):
    """The user can mend this by changing what they gave us."""


class SpecError(UserError):
    """A job spec or topology file that does not say something we can do."""


class CaptureError(UserError):
    """A model or loss that can't be turned into an OP-DAG."""


class DataError(UserError):
    """Data that is missing, unreadable or of the wrong shape."""


class PlanError(UserError):
    """No plan fits: too many fragments, too few workers or too little memory."""


class RefusedError(FusionError):
    """Something from outside failed its checks and was not used."""


class DagError(RefusedError):
    """An OP-DAG that fails validation."""


class BlobError(RefusedError):
    """A blob whose content does not match its name, or that is too large."""


class FrameError(RefusedError):
    """A wire message that fails validation."""


class VersionError(RefusedError):
    """A peer that speaks another protocol version."""


class ServiceError(FusionError):
    """A running part of the system failed or could not be reached."""


class CoordinatorError(ServiceError):
    """The coordinator answered a request with an error."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class AskAgainError(CoordinatorError):
    """The coordinator's answer is no, but may be another one in a moment: after so many seconds."""

    def __init__(self, message: str, status: int, seconds: float) -> None:
        super().__init__(message, status)
        self.seconds = seconds


class UnreachableError(ServiceError):
    """Nobody answers at the given address."""


class JobFailedError(ServiceError):
    """A job ended in a state other than done."""
