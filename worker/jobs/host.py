"""Hosts the fragments of one job: the compute thread that runs ready tasks and carries out what the session decides.

What arrives, and what the coordinator orders, comes through one queue; everything else here belongs to the compute
thread. What people and the coordinator should know goes out through `report`, which may be called from any thread.
"""

from __future__ import annotations

import gc
import queue
import threading
import traceback
from collections.abc import Callable, Mapping
from time import monotonic, perf_counter, thread_time, time

import torch
from pydantic import BaseModel
from torch import Tensor

from compress import Places
from executor.lanes import Lanes
from executor.ordering import Task, TaskKind
from executor.staging import Stager
from fusion.errors import FusionError
from fusion.messages import Adopted, Backup, BackupFailed, CaughtUp, Commit, Failure, Finished, Paused, Warned
from fusion.units import format_seconds
from fusion.wire import FrameKind, Header
from worker.jobs.assembly import Assembly, Piece
from worker.jobs.checkpoint_parts import CheckpointParts, Upload
from worker.jobs.events import Arrived, Event, PeerBack, Spoilt, Switch
from worker.jobs.explain import explain
from worker.jobs.rerun import Examine
from worker.jobs.side_by_side import SideBySide
from worker.jobs.spot_checks import SpotChecks, Testify
from worker.jobs.task_runner import EMPTY, TaskRunner
from worker.machine.memory import MemoryGuard
from worker.protocol import instructions as todo
from worker.protocol.accounts import Accounts
from worker.protocol.refusals import Refusals
from worker.protocol.session import Session
from worker.protocol.trace import Trace
from worker.protocol.waiting import Patience
from worker.transport.arrival import Arrival, Received, kept, staged, tensor_of
from worker.transport.parcel import Parcel
from worker.transport.route import Route
from worker.transport.surroundings import Surroundings

Report = Callable[[BaseModel], None]
Ship = Callable[[int, int, str, dict[str, Tensor]], None]
"""(fragment, step, backup worker, state): send a snapshot there, in the background."""
_TO_DEVICE = frozenset({FrameKind.ACTIVATION, FrameKind.GRADIENT, FrameKind.EVALUATION})
_LONG_REST = 0.02
"""Seconds: a worker that is slowed down computes gradients of weights until it owes this; a rest for each op would leave
its caches cold each time."""


def _no_backup(fragment: int, step: int, to: str, state: dict[str, Tensor]) -> None:
    raise AssertionError(f"no backups are kept, yet {to} was to hold fragment {fragment} after step {step}")


class JobHost:
    """The compute side of one job. `deliver` and `post` from the start, `start` once, `stop` at any time.

    `pieces` are those of the fragments that it begins with: they are its own from now on.
    With a `stager` (for a device other than the CPU), values are copied to and from the device beside the computation.
    `surroundings` say how slow the device is to be. With more than one of `lanes`, that many micro-batches are replayed at
    the same time, each with `threads`.
    """

    def __init__(
        self,
        assembly: Assembly,
        pieces: Mapping[int, Piece],
        *,
        threads: int,
        memory: MemoryGuard,
        report: Report,
        upload: Upload,
        ship: Ship = _no_backup,
        stager: Stager | None = None,
        surroundings: Surroundings | None = None,
        lanes: int = 1,
    ) -> None:
        self.assembly = assembly
        prepare = assembly.prepare
        self.job = prepare.job
        self.hosted = prepare.plan.fragments_of(assembly.worker)
        """The fragments that are here, or are about to be: kept by whoever posts a `Switch`."""
        self._worker = assembly.worker
        self._pieces = dict(pieces)
        self._threads = threads
        self._memory = memory
        self._report = report
        self._ship = ship
        self._stager = stager
        self._surroundings = surroundings or Surroundings()
        # One thread's own time: what it waited for a core is none of the device's slowness.
        self._busy_clock = thread_time if threads == 1 and stager is None else perf_counter
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._route: Route | None = None
        self._session: Session[Parcel] = Session(
            job=self.job,
            worker=self._worker,
            plan=prepare.plan,
            partition=assembly.partition,
            train=prepare.train,
            first_step=assembly.first_step,
            empty=EMPTY,
            log_bytes=prepare.log_bytes,
            log_own=prepare.verify,
        )
        self._checks: SpotChecks | None = None
        if prepare.verify:
            self._checks = SpotChecks(assembly, self._session, self._transmit, report)
        self._accounts = Accounts(self.job, prepare.train)
        self._beside: SideBySide | None = None
        if lanes > 1 and stager is None and self._surroundings.slowdown <= 1:
            self._beside = SideBySide(assembly, self._pieces, self._session, memory, Lanes(lanes, threads))
        self._runner = TaskRunner(
            assembly, self._pieces, self._session, self._accounts, stager, self._encode, report, self._beside
        )
        self._trace = Trace(perf_counter() - time())
        self._patience = Patience(prepare.failure_timeout)
        self._refusals = Refusals()
        self._parts = CheckpointParts(prepare.train, upload, lambda: self._events.put(None))
        self._finished_epoch = -1
        self._quiet_since = 0.0
        """When a task last ended, something wanted last came, or we last asked: what else comes is no reason to wait longer."""
        self._adopted_at = 0.0

    @property
    def epoch(self) -> int:
        """The plan epoch that is followed now."""
        return self._session.epoch

    def deliver(self, header: Header, sender: str, value: Received) -> None:
        """A message for this job has arrived and was admitted; from any thread."""
        at = perf_counter()
        arrival: Arrival = value
        digest = self._checks.digest(header, tensor_of(value)) if self._checks is not None else ""
        # Norms are put together on the CPU, whatever the device.
        if self._stager is not None and header.kind in _TO_DEVICE:
            arrival = staged(value, self._stager.to_device)
        self._events.put(Arrived(header, sender, arrival, at, digest))

    def places(self, gradient: Header) -> Places | None:
        """Which places the activation kept that this gradient answers, while it is still to come; from any thread."""
        return self._runner.sent.find(gradient)

    def spoilt(self, header: Header, sender: str, why: str) -> None:
        """A value for this job had to be refused; from any thread."""
        self._events.put(Spoilt(header, sender, why))

    def peer_back(self, peer: str) -> None:
        """The connection to a peer broke and stands again; from any thread."""
        self._events.put(PeerBack(peer))

    def post(self, event: Backup | Commit | Switch | Testify | Examine) -> None:
        """An order of the coordinator; from any thread."""
        self._events.put(event)

    def fail(self, error: Exception) -> None:
        """Something that this job needs failed on another thread: the job fails with it."""
        self._events.put(error)

    def start(self, route: Route) -> None:
        """Begin to train."""
        self._route = route
        self._thread = threading.Thread(target=self._main, name="compute", daemon=True)
        self._thread.start()

    def _encode(self, parcel: Parcel) -> None:
        assert self._route is not None
        self._route.encode(parcel)

    def stop(self) -> None:
        """End after the task at hand and wait for it; safe to call twice and before `start`."""
        self._stopping.set()
        self._events.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # The compute thread -------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            torch.set_num_threads(self._threads)
            self._run()
        except Exception as error:
            if not self._stopping.is_set():
                self._report(
                    Failure(
                        job=self.job,
                        epoch=self.epoch,
                        message=explain(error),
                        detail="" if isinstance(error, FusionError) else traceback.format_exc(),
                    )
                )
        finally:
            if self._beside is not None:
                self._beside.close()

    def _run(self) -> None:
        """Until stopped: a worker that has finished still answers from its log, and may get more to do."""
        self._session.begin()
        self._quiet_since = monotonic()
        while True:
            self._drain()
            self._carry_out()
            if self._stopping.is_set():
                return
            task = self._session.next_task()
            if self._checks is not None and self._checks.advance(busy=task is not None):
                continue
            if task is None:
                self._maybe_finished()
                self._wait()
            else:
                self._execute(task)

    def _execute(self, task: Task) -> None:
        begin, busy_from = perf_counter(), self._busy_clock()
        done = self._runner.run(task)

        def due() -> float:
            return self._surroundings.rest(self._busy_clock() - busy_from, perf_counter() - begin)

        # What came first is asked between the ops of WEIGHTS. What comes meanwhile waits until they have been rested for.
        while not done and due() < _LONG_REST and self._events.empty() and not self._stopping.is_set():
            done = self._runner.run(task)
        rest = due()
        if rest:
            self._stopping.wait(rest)
        end = perf_counter()
        took = None if self._beside is None else self._beside.took(task)
        self._accounts.spent(task, end - begin if took is None else took)
        self._trace.ran(task, begin, end)
        if done:
            self._session.completed(task)
        if task.kind is TaskKind.UPDATE and self._parts.due(task.step):
            self._parts.take(task.fragment, task.step, self._pieces[task.fragment].state())
        self._carry_out()
        self._parts.upload_but(self._session.replaying)
        self._quiet_since = monotonic()

    # What the session wants ---------------------------------------------------------------------------------------

    def _carry_out(self) -> None:
        """Do what the session has asked for, and what it asks for on that."""
        assert self._route is not None
        while instructions := self._session.take():
            for instruction in instructions:
                match instruction:
                    case todo.Send(to, header, parcel):
                        self._route.send(to, header, parcel)
                    case todo.LendParameters(fragment, step):
                        self._runner.lend_parameters(fragment, step)
                    case todo.TakeSnapshot(fragment, step, to):
                        self._ship(fragment, step, to, self._pieces[fragment].state())
                    case todo.ReportStep(step, fragments):
                        self._report_step(step, fragments)
                    case _:
                        self._report(self._message(instruction))

    def _message(self, instruction: todo.SayPaused | todo.SayCaughtUp | todo.MissBackup) -> BaseModel:
        match instruction:
            case todo.SayPaused(step):
                return Paused(job=self.job, epoch=self.epoch, step=step)
            case todo.MissBackup(fragment, step):
                return BackupFailed(job=self.job, epoch=self.epoch, step=step, fragment=fragment, cause="passed")
            case todo.SayCaughtUp(fragments, steps):
                took = monotonic() - self._adopted_at
                return CaughtUp(job=self.job, epoch=self.epoch, fragments=list(fragments), steps=steps, seconds=took)

    def _report_step(self, step: int, fragments: tuple[int, ...]) -> None:
        assert self._route is not None
        used = self._memory.used()
        sent, logged = self._route.take_sent(), self._session.measure_log()
        report = self._accounts.step_report(self.epoch, step, fragments, sent, used, logged, monotonic())
        self._report(report.model_copy(update={"trace": self._trace.take(step, perf_counter())}))
        self._memory.check(used)

    def _maybe_finished(self) -> None:
        """Say, once for each plan, that all is done here and the last state is uploaded."""
        session = self._session
        if not session.finished or not session.hosted or self._finished_epoch == session.epoch:
            return
        if self._parts.settled:
            self._finished_epoch = session.epoch
            self._report(Finished(job=self.job, epoch=session.epoch))

    # What comes in ------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Take in everything that has arrived, without waiting."""
        while True:
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return
            self._take_in(event)

    def _take_in(self, event: Event) -> None:
        match event:
            case Arrived(header, sender, value, at, digest):
                if self._checks is not None and self._checks.arrived(header, sender, value, digest):
                    return
                wanted = self._session.arrived(header, sender, value)
                if header.kind in (FrameKind.RESEND, FrameKind.MISSED):
                    return  # That others wait is no reason to wait longer for what they can't make without us.
                if header.kind is FrameKind.UNDER_WAY:
                    if not wanted:
                        self._patience.duplicated()
                    return
                if wanted:
                    self._patience.arrived()
                    self._quiet_since = monotonic()
                    if self._checks is not None:
                        self._checks.took(header, digest)
                    self._trace_arrival(header, sender, at)
                else:
                    self._patience.duplicated()
            case Spoilt(header, sender, why):
                self._refusals.note(header.key, sender, why, self._session.owed())
            case PeerBack(peer):
                self._session.ask_again(peer)
            case Backup():
                if event.epoch == self.epoch:
                    self._session.backup(
                        event.step, event.backups, event.hold, log_own=event.log_own, again=event.again
                    )
            case Commit():
                self._session.commit(event.step)
                if self._checks is not None:
                    self._checks.forget(event.step)
            case Testify():
                if self._checks is not None:
                    self._checks.testify(event)
            case Examine():
                if self._checks is not None:
                    self._checks.examine(event)
            case Switch():
                self._switch(event)
            case Exception():
                raise event

    def _trace_arrival(self, header: Header, sender: str, at: float) -> None:
        gradient = header.kind is FrameKind.GRADIENT
        if gradient or header.kind is FrameKind.ACTIVATION:
            edge = self.assembly.partition.edges[header.edge]
            maker = edge.target if gradient else edge.source
            self._trace.arrived(header.step, gradient, maker, header.micro_batch, at, sender)

    def _switch(self, event: Switch) -> None:
        self._adopted_at = monotonic()
        self._pieces.update(event.pieces)
        added = self._session.switch(event.plan, event.step)
        if self._checks is not None:
            self._checks.forget(event.step)
            self._checks.switched()
        handed_over = set(self._pieces) - set(self._session.hosted)
        self._parts.upload(handed_over)
        for fragment in handed_over:
            del self._pieces[fragment]
        self._accounts.forget(handed_over)
        if self._beside is not None:
            self._beside.forget(handed_over)
        if handed_over:
            # Optimizers hold on to themselves: only the collector frees their parameters, and it may come late.
            gc.collect()
        edges = self.assembly.partition.edges
        self._runner.sent.retain({edge.index for edge in edges if edge.source in self._pieces})
        self._report(Adopted(job=self.job, epoch=self.epoch, fragments=list(added)))

    def _wait(self) -> None:
        """Wait for the next arrival; ask again for what is owed when it is long in coming."""
        begin = monotonic()
        event: Event = None
        try:
            event = self._events.get(timeout=max(0.0, self._quiet_since + self._patience.left() - begin))
        except queue.Empty:
            self._ask_again()
            self._quiet_since = monotonic()
        self._accounts.waited(monotonic() - begin)
        self._take_in(event)

    def _transmit(self, to: str, header: Header, parcel: Parcel | None) -> None:
        """Send what a spot check asks for or shows; to this worker itself too."""
        if to != self._worker:
            assert self._route is not None
            self._route.send(to, header, parcel)
            return
        value = None if parcel is None else kept(parcel)
        digest = "" if self._checks is None else self._checks.digest(header, tensor_of(value))
        self._events.put(Arrived(header, to, value, perf_counter(), digest))

    def _ask_again(self) -> None:
        if self._checks is not None:
            self._checks.ask_again()
        owed = self._session.ask_again()
        silence = self._patience.asked()
        if silence is not None and owed:
            sources = ", ".join(sorted({source for source, _ in owed}))
            kind, edge, step, micro_batch = owed[0][1]
            self._report(
                Warned(
                    job=self.job,
                    message=f"has waited {format_seconds(silence)} for {sources} "
                    f"({kind.name.lower()} {edge} of step {step}, micro-batch {micro_batch}); still asking",
                )
            )
