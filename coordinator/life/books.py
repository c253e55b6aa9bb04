"""What all parts of the life cycle share: the pool, the jobs, and the instructions that have not been handed out yet."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.life import events as ev
from coordinator.life.jobs import Job
from coordinator.life.links import Links
from coordinator.life.pool import Member, Pool
from coordinator.life.relays import Relays
from fusion.messages import PeerAddress, Shutdown, ToWorker


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations in seconds."""

    failure_timeout: float = 5.0
    """Silence after which a worker without a job counts as lost; a busy one goes by its job's own timeout."""
    drain_patience: float = 60.0
    """How long a leaving worker waits until its fragments have moved, or for the next checkpoint of its job."""
    restart_grace: float = 5.0
    """After a restart of the coordinator: time for workers to connect again before silence counts."""
    quiet_after: float = 0.75
    """Three heartbeats: who was silent for so long may be gone, if there is another sign of it."""
    deaf_after: float = 0.5
    """The rest of a longer gap between two ticks is nobody's silence: the coordinator itself was not listening."""
    move_pause: float = 30.0
    """Between two moves of one job that only make it faster."""
    longest_stop: float = 2.0
    """A move whose snapshots take longer does not stop the training: its fragments replay what was trained meanwhile."""


class Books:
    """The state of the life cycle, without any of its rules."""

    def __init__(self, timing: Timing | None = None, links: Links | None = None) -> None:
        self.timing = timing or Timing()
        self.links = links or Links()
        self.relays = Relays(self.links)
        self.pool = Pool()
        self.jobs: dict[str, Job] = {}
        self._out: list[ev.Instruction] = []

    def job_of(self, member: Member) -> Job | None:
        """The job that has taken this worker."""
        return self.jobs.get(member.job) if member.job else None

    def hosts(self, job: Job) -> list[Member]:
        """The workers that take part in a job, in the order of the pool."""
        return [member for member in self.pool.of_job(job.id) if job.hosts.get(member.name) == member.incarnation]

    def addresses(self, job: Job) -> list[PeerAddress]:
        """How its workers reach each other."""
        return [member.address for member in self.hosts(job)]

    # Workers come free --------------------------------------------------------------------------------------------

    def free(self, member: Member) -> None:
        """A worker has nothing to do any more; one that is leaving goes."""
        member.job = None
        if member.state == "draining":
            self.leave(member, "drained")
        else:
            member.state = "idle"
            self.do(ev.SaveWorker(member.name))

    def leave(self, member: Member, why: str) -> None:
        """Let a worker go for good."""
        member.state, member.job, member.leave_by = "left", None, None
        self.do(ev.Send(member.incarnation, Shutdown(reason=why)))
        self.do(ev.SaveWorker(member.name))
        self.story(None, "worker-left", f"worker {member.name} left ({why})", worker=member.name)

    # Instructions -------------------------------------------------------------------------------------------------

    def do(self, instruction: ev.Instruction) -> None:
        self._out.append(instruction)

    def tell(self, job: Job, message: ToWorker, workers: tuple[str, ...] | None = None) -> None:
        """Send a message to the job's workers, or to some of them by name."""
        for name in job.hosts if workers is None else workers:
            if name in job.hosts:
                self.do(ev.Send(job.hosts[name], message))

    def save(self, job: Job, *, announce: bool = True, soon: bool = False) -> None:
        self.do(ev.SaveJob(job.id, announce, soon))

    def story(self, job: Job | None, event: str, message: str, **fields: str | int | float | None) -> None:
        """Tell people."""
        self.do(ev.RecordEvent(job.id if job else None, event, message, fields))

    def taken(self) -> list[ev.Instruction]:
        """Hand out the instructions, in order."""
        taken, self._out = self._out, []
        return taken
