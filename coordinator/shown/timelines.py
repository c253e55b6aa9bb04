"""The last steps of the jobs as their workers traced them, by one clock: tasks, transfers, and what was neither. Sans I/O.

Workers' clocks differ. A report that was put together at `t` of the worker's clock and arrived at `t'` of ours was on its
way for at least nothing, so the least `t' - t` of a worker's last reports is what its clock is behind, plus the shortest way;
every worker's times are moved by its own.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fusion.messages import StepReport, StepTrace

STEPS_KEPT = 6
JOBS_KEPT = 16
STEPS_SHOWN = 2
_REPORTS = 16
_CLOCKS = 32
_LONGEST = 1e6


@dataclass(slots=True)
class _Worker:
    """What one worker of one job said last."""

    behind: deque[float] = field(default_factory=lambda: deque(maxlen=_CLOCKS))
    """Our clock less its own at the arrival of a trace."""
    reports: deque[tuple[float, float, float, float]] = field(default_factory=lambda: deque(maxlen=_REPORTS))
    """When each of the last reports came, and its seconds of forward, backward and update."""

    @property
    def offset(self) -> float:
        return min(self.behind, default=0.0)


@dataclass(slots=True)
class _Step:
    epoch: int
    traces: dict[str, StepTrace] = field(default_factory=dict)
    fragments: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Job:
    epoch: int = 0
    workers: dict[str, _Worker] = field(default_factory=dict)
    steps: OrderedDict[int, _Step] = field(default_factory=OrderedDict)


class Timelines:
    """Of the jobs that were heard of last."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, _Job] = OrderedDict()

    def note(self, worker: str, report: StepReport, now: float) -> None:
        """Take in a step's report."""
        job = self._jobs.setdefault(report.job, _Job(report.epoch))
        self._jobs.move_to_end(report.job)
        while len(self._jobs) > JOBS_KEPT:
            self._jobs.popitem(last=False)
        if report.epoch != job.epoch:  # Other workers, or other fragments on them.
            job.epoch = report.epoch
            for known in job.workers.values():
                known.reports.clear()
        known = job.workers.setdefault(worker, _Worker())
        times = report.fragments
        known.reports.append(
            (
                now,
                sum(each.forward for each in times),
                sum(each.backward for each in times),
                sum(each.update for each in times),
            )
        )
        trace = report.trace
        if trace is None or not _plausible(trace):
            return
        known.behind.append(now - (trace.begun + trace.told))
        step = job.steps.get(report.step)
        if step is None or step.epoch != report.epoch:
            step = job.steps[report.step] = _Step(report.epoch)
            job.steps.move_to_end(report.step)
        step.traces[worker] = trace
        step.fragments.update(each.fragment for each in times)
        while len(job.steps) > STEPS_KEPT:
            job.steps.popitem(last=False)

    def shown(self, job_id: str, fragments: int) -> dict[str, Any]:
        """As JSON: the last steps of which every one of so many fragments was traced, and the shares of each worker's time."""
        job = self._jobs.get(job_id)
        if job is None:
            return {"origin": 0.0, "steps": [], "workers": [], "spans": [], "shares": [], "bubble": None}
        whole = [number for number, step in job.steps.items() if len(step.fragments) == fragments]
        numbers = _last_in_a_row(sorted(whole))
        names = _in_order(trace for number in numbers for trace in job.steps[number].traces.items())
        spans: list[dict[str, Any]] = []
        steps: list[dict[str, Any]] = []
        for number in numbers:
            found = _spans(number, job.steps[number].traces, {name: job.workers[name].offset for name in names})
            begin = min(span["begin"] for span in found)
            end = max(span["end"] for span in found)
            steps.append({"step": number, "epoch": job.steps[number].epoch, "begin": begin, "end": end})
            spans += found
        origin = min((step["begin"] for step in steps), default=0.0)
        for item in (*spans, *steps):
            item["begin"] -= origin
            item["end"] -= origin
        shares, bubble = _shares(job)
        return {
            "origin": origin,
            "steps": steps,
            "workers": names,
            "spans": spans,
            "shares": shares,
            "bubble": bubble,
        }


def _plausible(trace: StepTrace) -> bool:
    """A worker may say anything; what can't be drawn is left out."""
    times = [time for task in trace.tasks for time in task[3:]] + [arrival[3] for arrival in trace.arrivals]
    ordered = all(begin <= end for *_, begin, end in trace.tasks)
    return bool(trace.tasks) and ordered and abs(trace.told) < _LONGEST and all(abs(time) < _LONGEST for time in times)


def _last_in_a_row(numbers: list[int]) -> list[int]:
    """The last numbers that follow each other, at most `STEPS_SHOWN`."""
    row = numbers[-1:]
    while row and len(row) < STEPS_SHOWN and row[0] - 1 in numbers:
        row.insert(0, row[0] - 1)
    return row


def _in_order(traces: Iterable[tuple[str, StepTrace]]) -> list[str]:
    """Workers by the first fragment that they run, which is the order of the pipeline."""
    first: dict[str, int] = {}
    for worker, trace in traces:
        first[worker] = min(first.get(worker, trace.tasks[0][1]), *(task[1] for task in trace.tasks))
    return sorted(first, key=lambda worker: first[worker])


def _spans(step: int, traces: dict[str, StepTrace], offsets: dict[str, float]) -> list[dict[str, Any]]:
    """Tasks and transfers of one step by the coordinator's clock. A transfer begins when its maker is done."""
    spans: list[dict[str, Any]] = []
    made: dict[tuple[str, int, int], float] = {}
    for worker, trace in traces.items():
        base = trace.begun + offsets[worker]
        for kind, fragment, micro_batch, begin, end in trace.tasks:
            made[kind, fragment, micro_batch] = base + end
            spans.append(
                {
                    "worker": worker,
                    "kind": kind,
                    "fragment": fragment,
                    "micro_batch": micro_batch,
                    "step": step,
                    "begin": base + begin,
                    "end": base + end,
                    "sender": None,
                }
            )
    for worker, trace in traces.items():
        base = trace.begun + offsets[worker]
        for what, fragment, micro_batch, at, sender in trace.arrivals:
            begun = made.get(("forward" if what == "activation" else "backward", fragment, micro_batch))
            if begun is not None:
                spans.append(
                    {
                        "worker": worker,
                        "kind": what,
                        "fragment": fragment,
                        "micro_batch": micro_batch,
                        "step": step,
                        "begin": min(begun, base + at),
                        "end": base + at,
                        "sender": sender,
                    }
                )
    return spans


def _shares(job: _Job) -> tuple[list[dict[str, Any]], float | None]:
    """Seconds per step of each worker by what it did, over its last reports; the bubble is the idle share of all."""
    shares: list[dict[str, Any]] = []
    for name, worker in job.workers.items():
        count = len(worker.reports) - 1
        if count < 1:
            continue
        seconds = (worker.reports[-1][0] - worker.reports[0][0]) / count
        # The first report's tasks ran before the time that is counted.
        forward, backward, update = (
            sum(report[part] for report in list(worker.reports)[1:]) / count for part in (1, 2, 3)
        )
        idle = max(0.0, seconds - forward - backward - update)
        shares.append(
            {
                "worker": name,
                "forward": forward,
                "backward": backward,
                "update": update,
                "idle": idle,
                "step_seconds": seconds,
            }
        )
    total = sum(share["step_seconds"] for share in shares)
    return shares, sum(share["idle"] for share in shares) / total if total > 0 else None
