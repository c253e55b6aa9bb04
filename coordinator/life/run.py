"""One run of a job: from its preparation to its end or to the next restart from a checkpoint.

A run begins with a plan epoch; each adoption and each move makes the next one. What is written down here is all that is
needed to go on without going back, also for a coordinator that was restarted.
"""

from __future__ import annotations

from pydantic import BaseModel, Field

from coordinator.life.inspection import Inspection

SMALLEST_MARGIN = 2
"""Steps between the last one heard of and the one whose snapshots are ordered."""
PATIENCE = 60.0
"""Seconds after which a round counts as stuck."""


class Round(BaseModel):
    """Snapshots of one common step are ordered and not all held yet."""

    step: int
    epoch: int
    backups: dict[int, str]
    """Fragment -> the worker that is to hold its snapshot; with `moves`, of a moving fragment its new host."""
    moves: bool = False
    """Fragments move when it is complete."""
    hold: bool = False
    """Nobody begins a step after this one: those that move have nothing to replay."""
    seconds: float = 0.0
    """Over which its snapshots are to be spread; 0: as fast as they go."""
    ordered_at: float
    said_at: float = 0.0
    """When hosts were told last."""
    taken_at: float | None = None
    """When the first host was through with `step`: the snapshots are under way since then."""
    cost: float | None = None
    """Seconds from there until the last snapshot was held."""
    held: list[int] = Field(default_factory=list)
    paused: list[str] = Field(default_factory=list)


class Switch(BaseModel):
    """A new placement that not everybody has said to follow, or whose adopted fragments still replay."""

    since: float
    sent_at: float
    awaited: list[str]
    """Workers that have not said `Adopted`."""
    behind: list[int] = Field(default_factory=list)
    """Adopted fragments that are not where the others were."""
    until: int = 0
    """A fragment that has reported this step has caught up."""


class Move(BaseModel):
    """Fragments that are to change their host in good order."""

    placement: tuple[str, ...]
    weights_behind: tuple[int, ...] = ()
    """As in a plan made for these hosts."""
    cause: str
    newcomers: list[str] = Field(default_factory=list)
    """Workers of the new placement that have not taken part yet."""
    unready: list[str] = Field(default_factory=list)
    """Newcomers that have not said `Ready`."""
    unconnected: list[str] = Field(default_factory=list)
    """Hosts that have not connected to the newcomers."""
    since: float = 0.0
    grew_at: float = 0.0
    """When a newcomer that is not ready was last seen to hold more than before: what it downloads comes in."""
    memory: dict[str, int] = Field(default_factory=dict)
    """Newcomer -> bytes that its process held then."""


class Setback(BaseModel):
    """A worker was to join the run, and it came to nothing."""

    incarnation: str
    times: int = 0
    """In a row."""
    until: float | None = None
    """The worker is left alone until then; None: it may be tried again."""
    slow: bool = False
    """It had not said `Ready` in time; nothing else is wrong with it."""


class Times(BaseModel):
    """Seconds that a fragment took for each of its first and last steps on one worker."""

    worker: str
    first: list[float] = Field(default_factory=list)
    last: list[float] = Field(default_factory=list)


class Run(BaseModel):
    """The record of a run."""

    epoch: int
    """That it began with."""
    start: int
    """The step after which it began; until the first commit this is the common step."""
    from_origin: bool = True
    """It began from the job's own weights, not from a checkpoint."""
    again_until: int = 0
    """Steps up to this one were reported before it began."""

    common_step: int
    """Every fragment's state after this step is held by its holder, and everybody is through with it."""
    holders: dict[int, str] = Field(default_factory=dict)
    backups: dict[int, str] = Field(default_factory=dict)
    """Fragment -> the worker that the next snapshot goes to."""
    refused: dict[int, list[str]] = Field(default_factory=dict)
    """Fragment -> workers that had no room for its snapshot."""
    standby: list[str] = Field(default_factory=list)
    """Workers without a fragment that hold snapshots all the same (`standby.py`)."""
    alone: str = ""
    """Why something runs without a backup, as people were told."""

    round: Round | None = None
    margin: int = SMALLEST_MARGIN
    prepared_at: float = Field(default=0.0, exclude=True)
    """When hosts were last told to build their fragments; not kept, as a restart of the coordinator begins anew then."""
    prepare_patience: float = Field(default=0.0, exclude=True)
    """Seconds after that in which they may do so before they are told again: doubles each time."""
    patience: float = PATIENCE
    """Doubles each time that a round is stuck, and is three times what the last one took: snapshots may be large and links slow."""
    spacing: int = 3
    """Steps that lay between the last rounds, or should have."""
    cost: float = 0.0
    """Seconds for which the snapshots of the last round were under way."""
    pace: float = 0.0
    """Seconds per step, averaged over the last ones; 0 when not known yet."""
    urgent: bool = False
    """Some fragments are held by their own host only."""

    settled: int = 0
    """Steps up to this one are past their spot checks: what came of them may be given out."""
    since_epoch: int = 0
    """The plan epoch in which everybody went on from the common step."""
    inspection: Inspection | None = Field(default=None, exclude=True)
    """Not kept over a restart of the coordinator: what was ordered is given up then."""

    highest: int = 0
    """The last step that any fragment has finished."""
    reached: dict[int, int] = Field(default_factory=dict)
    """Fragment -> the last step that it has finished."""
    log_bytes: dict[str, int] = Field(default_factory=dict)

    switch: Switch | None = None
    replaying: list[int] = Field(default_factory=list)
    """Fragments that replay, or have replayed, since the last change of placement."""
    replayed: dict[str, int] = Field(default_factory=dict)
    """Worker -> the epoch for which people were told that it has caught up."""
    move: Move | None = None
    reconsider: str = ""
    """Why another placement may be better now; empty when nothing has changed."""
    asked_for_move: int | None = None
    """The attempt of a request to the scheduler for another placement."""
    asked_because: str = ""
    asked_at: float | None = None
    recut: str = ""
    """Why the job is to go on with other cuts from its next checkpoint; empty when it is not."""
    cant_move: str = ""
    """Why the scheduler or a worker said that the fragments of workers that leave can't move."""
    moved_at: float | None = None
    """When fragments moved last, or would have."""
    moved_step: int | None = None
    setbacks: dict[str, Setback] = Field(default_factory=dict)
    """By worker (`setbacks.py`)."""
    left: dict[str, list[int]] = Field(default_factory=dict)
    """Worker -> the fragments that it had before they moved away; it may still upload its share of a checkpoint."""
    times: dict[int, Times] = Field(default_factory=dict)
    """By fragment."""
