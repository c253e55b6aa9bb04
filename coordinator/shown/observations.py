"""What is seen of the pool beyond its records, for people to look at: it is not stored, and decides nothing."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from coordinator.life.jobs import Job
from coordinator.life.pool import Pool
from coordinator.shown.curves import Curves
from coordinator.shown.publisher import Item, Publisher
from coordinator.shown.timelines import Timelines
from coordinator.shown.traffic import Traffic
from coordinator.storage.store import Store
from fusion.messages import StepReport

_CURVES_KEPT = 32
PAGE = 1000
PULSE_SECONDS = 2.0


class Observations:
    """Live traffic, the last steps' timelines, and the curves of the jobs that were asked about last."""

    def __init__(self, store: Store) -> None:
        self.traffic = Traffic()
        self.timelines = Timelines()
        self._store = store
        self._curves: OrderedDict[str, Curves] = OrderedDict()
        self._pulse_due = 0.0

    def note(self, pool: Pool, incarnation: str, report: StepReport, now: float) -> None:
        """A worker has finished a step; what it says of a job or a peer that is not its own is left out."""
        member = pool.of_incarnation(incarnation)
        if member is not None and member.job == report.job:
            known = {name: size for name, size in report.sent_to.items() if pool.get(name) is not None}
            self.traffic.note(member.name, known, now)
            self.timelines.note(member.name, report, now)

    def recorded(self, job: str, metric: dict[str, Any]) -> None:
        """A step was recorded; curves that nobody has asked for are made when somebody does."""
        curves = self._curves.get(job)
        if curves is not None and metric["step"] == curves.last + 1:
            curves.add(metric)

    def curves(self, job: Job) -> tuple[Curves, bool]:
        """The job's curves, a page of its records further than before; and whether that was the last page."""
        curves = self._curves.setdefault(job.id, Curves())
        self._curves.move_to_end(job.id)
        while len(self._curves) > _CURVES_KEPT:
            self._curves.popitem(last=False)
        page = self._store.metrics(job.id, curves.last, PAGE)
        for metric in page:
            curves.add(metric)
        return curves, len(page) < PAGE

    def beat(self, pool: Pool, publisher: Publisher, now: float) -> None:
        """Publish a pulse when one is due."""
        if now < self._pulse_due:
            return
        self._pulse_due = now + PULSE_SECONDS
        self.traffic.forget_quiet(now)
        if publisher.watched:
            publisher.publish(Item("pulse", None, self.pulse(pool, now)))

    def pulse(self, pool: Pool, now: float) -> dict[str, Any]:
        """What changes all the time: memory of the workers, bytes on the links, and why nothing can be recorded, if so."""
        return {
            "time": now,
            "unwritten": self._store.behind,
            "memory": {member.name: member.memory_used_bytes for member in pool.live()},
            "traffic": [
                {"from": sender, "to": receiver, "bytes_per_second": round(rate)}
                for sender, receiver, rate in self.traffic.rates(now)
            ],
        }
