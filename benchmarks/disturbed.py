"""Trains a job on a pool of real processes while things happen to them; what `chaos.py` and the system tests share."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.faulty_worker import HOLD
from fusion.client import Client, StreamItem
from fusion.errors import FusionError
from fusion.follow import follow
from fusion.local import LocalPool, LocalWorker
from fusion.submit import CapturedJob, submit

MODULE = "benchmarks.faulty_worker"
_POLL = 0.02


@dataclass
class Outcome:
    """What came of a run."""

    job: dict[str, Any]
    losses: dict[int, float]
    evaluations: dict[int, float]
    weights: dict[str, Tensor]
    step_seconds: dict[int, float]
    events: list[dict[str, Any]]
    seconds: float
    repeated: list[int] = field(default_factory=list)
    """Steps that were published more than once; there must be none."""

    def count(self, *events: str) -> int:
        return sum(event["event"] in events for event in self.events)


class FaultyPool(LocalPool):
    """A pool whose workers can be made to fail at exact points."""

    def __init__(self, folder: Path, workers: Sequence[str]) -> None:
        self.faults = folder / "faults"
        self.faults.mkdir(parents=True, exist_ok=True)
        (self.faults / HOLD).touch()
        os.environ["FAULT_FOLDER"] = str(self.faults)
        self._deadly: set[str] = set()
        """Workers whose next point is, or was, their end."""
        super().__init__(folder, [LocalWorker(name) for name in workers], dashboard=False, worker_module=MODULE)

    def fail_at(self, worker: str, point: str) -> None:
        """Have this worker kill itself (or, with `cut`, its connections) the next time it comes to this point."""
        draft = self.faults / f".{worker}"
        draft.write_text(point, encoding="utf-8")
        if point == "cut":
            self._deadly.discard(worker)  # It takes the place of a point that was still to come.
        else:
            self._deadly.add(worker)
        draft.rename(self.faults / worker)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Have no worker begin a task meanwhile: the job takes no further step, however long things take here."""
        with (self.faults / HOLD).open("w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def pending(self, worker: str) -> bool:
        """Whether the worker has not come to the point yet."""
        return (self.faults / worker).exists()

    def forgive(self, worker: str) -> None:
        """Take a fault back that has not happened."""
        with suppress(FileNotFoundError):
            (self.faults / worker).unlink()
            self._deadly.discard(worker)

    def alive(self, worker: str) -> bool:
        child = next((child for child in self._children if child.name == worker), None)
        if child is not None and worker in self._deadly and not self.pending(worker):
            child.process.wait()  # It has come to its point: the kernel takes a while to end a large process.
        return child is not None and child.process.poll() is None

    def signal(self, worker: str, number: int) -> None:
        os.kill(self.process_ids()[worker], number)

    def stall(self, worker: str) -> None:
        self.signal(worker, signal.SIGSTOP)

    def wake(self, worker: str) -> None:
        """Let it go on, unless it has died of a fault since."""
        with suppress(ProcessLookupError, KeyError):
            self.signal(worker, signal.SIGCONT)

    def last_words(self, worker: str) -> str:
        """The end of its log."""
        return "\n".join((self.folder / "logs" / f"{worker}.log").read_text(encoding="utf-8").splitlines()[-20:])

    def start_again(self, worker: str) -> None:
        """Start a worker that has died."""
        if worker in self.process_ids():
            self.forget(worker)
        self.forgive(worker)
        self._deadly.discard(worker)
        self.start_worker(LocalWorker(worker))


class Running:
    """A job under way, followed from another thread."""

    def __init__(self, pool: LocalPool, job: CapturedJob) -> None:
        self._pool = pool
        with pool.client() as client:
            self.id = str(submit(client, job)["id"])
        self._began = time.monotonic()
        self._changed = threading.Condition()
        self._metrics: dict[int, dict[str, Any]] = {}
        self._repeated: list[int] = []
        self.events: list[dict[str, Any]] = []
        self.arrived: dict[int, float] = {}
        """Step -> when it was heard of (monotonic seconds)."""
        self.ended: dict[str, Any] | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True, name="follow")
        self._thread.start()

    @property
    def step(self) -> int:
        """The last step that was published."""
        with self._changed:
            return max(self._metrics, default=0)

    @property
    def losses(self) -> dict[int, float]:
        """Those of the steps that were published so far."""
        with self._changed:
            return {step: float(metric["loss"]) for step, metric in self._metrics.items()}

    def until(self, holds: Callable[[], Any], seconds: float = 120.0) -> Any:
        """Wait until `holds()` is true, looked at whenever something is heard, and often; returns what it returned.

        Raises `TimeoutError`, with the story so far.
        """
        deadline = time.monotonic() + seconds
        while not (found := holds()):
            with self._changed:
                self._changed.wait(_POLL)
            if self._error is not None:
                raise self._error
            if time.monotonic() > deadline:
                raise TimeoutError(f"step {self.step} after {seconds:.0f} s; {self.story()}")
        return found

    def until_step(self, step: int, seconds: float = 120.0) -> None:
        self.until(lambda: self.ended is not None or self.step >= step, seconds)

    def heard(self, event: str, count: int = 1) -> bool:
        return self.count(event) >= count

    def count(self, event: str) -> int:
        with self._changed:
            return sum(told["event"] == event for told in self.events)

    def plan(self) -> tuple[str, ...]:
        """The placement of the moment; empty while there is none."""
        with self._pool.client() as client:
            plan = client.job(self.id).get("plan") or {}
            return tuple(plan.get("placement", ()))

    def backups(self) -> dict[int, str]:
        """Fragment -> its backup worker."""
        with self._pool.client() as client:
            return {int(key): str(name) for key, name in (client.job(self.id).get("backups") or {}).items()}

    def common_step(self) -> int:
        with self._pool.client() as client:
            return int(client.job(self.id).get("common_step") or 0)

    def story(self) -> str:
        with self._changed:
            return "\n".join(f"  {event['message']}" for event in self.events[-40:])

    def finish(self, seconds: float = 600.0) -> Outcome:
        """Wait for the end and bring everything home. Raises `AssertionError` when the job does not end well."""
        self.until(lambda: self.ended is not None, seconds)
        took = time.monotonic() - self._began
        assert self.ended is not None
        assert self.ended["state"] == "done", f"{self.ended['reason']}\n{self.story()}"
        self._thread.join()
        target = self._pool.folder / f"{self.id}.safetensors"
        last = max(self._metrics)
        with self._pool.client() as client:
            client.download_checkpoint(self.id, last, "model", target)
        return Outcome(
            job=self.ended,
            losses={step: metric["loss"] for step, metric in self._metrics.items()},
            evaluations={s: m["eval_loss"] for s, m in self._metrics.items() if m.get("eval_loss") is not None},
            weights=load_file(target),
            step_seconds={step: metric["step_seconds"] for step, metric in self._metrics.items()},
            events=list(self.events),
            seconds=took,
            repeated=self._repeated,
        )

    def _follow(self) -> None:
        try:
            with self._patient_client() as client:
                for item in follow(client, self.id, give_up_seconds=120):
                    self._take(item)
        except BaseException as error:
            self._error = error

    def _patient_client(self) -> Client:
        return self._pool.client()

    def _take(self, item: StreamItem) -> None:
        with self._changed:
            if item.kind == "metrics":
                step = int(item.data["step"])
                if step in self._metrics:
                    self._repeated.append(step)
                self._metrics[step] = item.data
                self.arrived[step] = time.monotonic()
            elif item.kind == "event":
                self.events.append(item.data)
            elif item.kind == "job" and item.data.get("state") in ("done", "failed", "cancelled"):
                self.ended = item.data
            self._changed.notify_all()


def joined(pool: LocalPool, workers: Sequence[str]) -> set[str]:
    """Those of these workers whose process of now is in the pool; none when the coordinator can't be asked now.

    A dead one that nobody has missed yet is in the pool as well, while its successor is still on its way.
    """
    # Not what the kernel says of the process: it counts from the boot, which it knows to the second.
    started_at = pool.started_at()
    with suppress(FusionError), pool.client() as client:
        return {
            each["name"]
            for each in client.workers()
            if each["name"] in workers
            and each["state"] not in ("lost", "left")
            and each["joined_at"] >= started_at.get(each["name"], 0.0)
        }
    return set()


def differences(one: Outcome, other: Outcome) -> list[str]:
    """What is not bit for bit the same."""
    found: list[str] = []
    for what, right, got in (
        ("loss of step", one.losses, other.losses),
        ("evaluation at", one.evaluations, other.evaluations),
    ):
        found += [f"{what} {s}: {got.get(s)}, not {right[s]}" for s in sorted(right) if right[s] != got.get(s)]
    if one.losses.keys() != other.losses.keys():
        found.append(f"steps {sorted(one.losses.keys() ^ other.losses.keys())}")
    if one.weights.keys() != other.weights.keys():
        found.append("names of the weights")
    found += [
        f"weight {name}"
        for name, value in one.weights.items()
        if name in other.weights and not value.equal(other.weights[name])
    ]
    return found + [f"step {step} was published twice" for step in (*one.repeated, *other.repeated)]
