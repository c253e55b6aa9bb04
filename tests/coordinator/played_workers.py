"""Workers that are played, without numbers and sockets: they hear late, answer late, and hold each other's snapshots."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from coordinator_cases import ref_of

from fusion.messages import (
    Adopt,
    Adopted,
    Backup,
    BackupFailed,
    CaughtUp,
    CheckpointPart,
    Commit,
    Connect,
    Connected,
    Finished,
    FragmentTimes,
    Holding,
    Paused,
    Prepare,
    Ready,
    Shutdown,
    Start,
    StepReport,
    Stop,
    ToCoordinator,
    ToWorker,
)
from fusion.plan import Plan


@dataclass
class Hosting:
    """What a worker knows of the job that it takes part in."""

    prepare: Prepare
    plan: Plan
    start: int
    done: dict[int, int]
    """Fragment hosted here -> the last step that it has finished."""
    held: dict[int, set[int]] = field(default_factory=dict)
    """Fragment -> the steps whose snapshots are here."""
    committed: int = 0
    order: Backup | None = None
    adopted: list[int] = field(default_factory=list)
    started: bool = False


class Network:
    """What the workers of one run have done so far, and the snapshots that are on their way between them."""

    def __init__(self) -> None:
        self.furthest: dict[tuple[str, int, int], int] = {}
        """(job, first epoch of the run, fragment) -> the last step that anybody finished for it."""
        self.runs: dict[tuple[str, int], int] = {}
        """(job, epoch that somebody was prepared for) -> first epoch of the run."""
        self.snapshots: list[tuple[Backup, int, str]] = []
        """(order, fragment, the worker that is to hold it)."""


class PlayedWorker:
    """One incarnation. `hear` takes in what was sent to it; what it says is returned."""

    def __init__(self, name: str, network: Network) -> None:
        self.name = name
        self.network = network
        self.inbox: deque[ToWorker] = deque()
        self.job: Hosting | None = None

    @property
    def run(self) -> tuple[str, int]:
        assert self.job is not None
        prepare = self.job.prepare
        return prepare.job, self.network.runs[prepare.job, prepare.plan.epoch]

    def hear(self) -> list[ToCoordinator]:
        said: list[ToCoordinator] = []
        while self.inbox:
            said += self._take_in(self.inbox.popleft())
        return said

    def _take_in(self, message: ToWorker) -> list[ToCoordinator]:
        here = self.job
        match message:
            case Prepare() if here is not None and not here.started and here.prepare == message:
                return []
            case Prepare():
                start = message.resume.step if message.resume else 0
                done = dict.fromkeys(message.plan.fragments_of(self.name), start)
                self.job = Hosting(message, message.plan, start, done)
                return [Ready(job=message.job, epoch=message.plan.epoch)]
            case Shutdown():
                self.job = None
            case Stop() if here is not None and here.prepare.job == message.job:
                self.job = None
            case Connect():
                return [Connected(job=message.job, peers=[peer.worker for peer in message.peers])]
            case Start() if here is not None and here.plan.epoch == message.epoch:
                here.started = True
            case Backup() if here is not None and here.plan.epoch == message.epoch:
                return self._ordered(here, message)
            case Commit() if here is not None:
                here.committed = max(here.committed, message.step)
                here.held = {
                    fragment: {step for step in steps if step >= message.step} for fragment, steps in here.held.items()
                }
            case Adopt() if here is not None and here.plan.epoch < message.plan.epoch:
                return self._adopt(here, message)
            case _:
                pass
        return []

    def _ordered(self, here: Hosting, order: Backup) -> list[ToCoordinator]:
        if order.again and here.order is not None and here.order.step == order.step:
            return []
        late = [fragment for fragment, done in here.done.items() if done >= order.step]
        if late:
            return [BackupFailed(job=order.job, epoch=order.epoch, step=order.step, fragment=late[0], cause="passed")]
        here.order = order
        return []

    def _adopt(self, here: Hosting, message: Adopt) -> list[ToCoordinator]:
        mine = message.plan.fragments_of(self.name)
        fresh = [fragment for fragment in mine if fragment not in here.done]
        assert message.step >= here.committed, "asked to go on from what others have forgotten"
        for fragment in fresh:
            kept = message.step in here.held.get(fragment, set())
            assert kept or message.step == here.start, f"{self.name} has no snapshot {message.step} of {fragment}"
        if here.order is not None and here.order.step == message.step:
            for fragment in set(here.done) - set(mine):  # It moved with our snapshot, which stays here too.
                here.held.setdefault(fragment, set()).add(message.step)
        here.done = {fragment: here.done.get(fragment, message.step) for fragment in mine}
        here.plan, here.order, here.adopted, here.started = message.plan, None, fresh, True
        here.committed = message.step
        return [Adopted(job=message.job, epoch=message.plan.epoch, fragments=fresh), *self._caught_up(here)]

    def _caught_up(self, here: Hosting) -> list[ToCoordinator]:
        if not here.adopted or len(set(here.done.values())) > 1:
            return []
        fragments, here.adopted = here.adopted, []
        job, epoch = here.prepare.job, here.plan.epoch
        return [CaughtUp(job=job, epoch=epoch, fragments=fragments, steps=1, seconds=0.1)]

    def step(self) -> list[ToCoordinator]:
        """The next step of those fragments that are behind, as far as the others let them."""
        here = self.job
        if here is None or not here.started or not here.done:
            return []
        step = min(here.done.values()) + 1
        train, job, epoch = here.prepare.train, here.prepare.job, here.plan.epoch
        others = [
            self.network.furthest.get((*self.run, fragment), here.start) for fragment in range(len(here.plan.placement))
        ]
        if step > train.steps or step > min(others) + 1 or (here.order and here.order.hold and step > here.order.step):
            return []
        mine = [fragment for fragment, done in here.done.items() if done == step - 1]
        for fragment in mine:
            here.done[fragment] = step
            key = (*self.run, fragment)
            self.network.furthest[key] = max(step, self.network.furthest.get(key, 0))
        times = [FragmentTimes(fragment=index, forward=0, backward=0, update=0) for index in mine]
        said: list[ToCoordinator] = [StepReport(job=job, epoch=epoch, step=step, fragments=times, loss=0.5)]
        if step == train.steps or (train.checkpoint_every and step % train.checkpoint_every == 0):
            said += [
                CheckpointPart(
                    job=job, epoch=epoch, step=step, fragment=index, blob=ref_of(f"{job}{step}{index}".encode())
                )
                for index in mine
            ]
        if here.order is not None and here.order.step == step:
            self.network.snapshots += [
                (here.order, index, here.order.backups[index]) for index in mine if index in here.order.backups
            ]
            if here.order.hold:
                said.append(Paused(job=job, epoch=epoch, step=step))
        return said + self._caught_up(here)

    def finish(self) -> list[ToCoordinator]:
        here = self.job
        if here is None or not here.done or min(here.done.values()) < here.prepare.train.steps:
            return []
        return [Finished(job=here.prepare.job, epoch=here.plan.epoch)]

    def hold(self, order: Backup, fragment: int) -> list[ToCoordinator]:
        """A snapshot has arrived."""
        if self.job is None or self.job.prepare.job != order.job or self.job.plan.epoch != order.epoch:
            return []
        self.job.held.setdefault(fragment, set()).add(order.step)
        return [Holding(job=order.job, epoch=order.epoch, step=order.step, fragment=fragment)]
