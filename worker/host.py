"""Hosts the fragments of one job: the compute thread that runs ready tasks and passes their results on.

Arrivals come through one queue (`deliver`, from the data plane's thread); everything else here belongs to the compute
thread. What people and the coordinator should know goes out through `report`, which may be called from any thread.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from time import monotonic, perf_counter

import torch
from pydantic import BaseModel
from torch import Tensor

from executor.board import TaskBoard
from executor.ordering import Task, TaskKind
from executor.staging import Stager, ToDevice
from fusion.errors import FusionError
from fusion.messages import Failure, Finished, Warned
from fusion.units import format_seconds
from fusion.wire import FrameKind, Header
from worker.accounts import Accounts
from worker.assembly import Assembly
from worker.explain import explain
from worker.inbox import Inbox
from worker.memory import MemoryGuard
from worker.pacing import Pacing
from worker.replay_log import Key
from worker.route import Route
from worker.waiting import Patience
from worker.ways import misfit, ways

Report = Callable[[BaseModel], None]
Upload = Callable[[int, int, dict[str, Tensor]], "Future[None]"]
"""(step, fragment, state) -> done when the part is at the coordinator, or was given up with a warning."""
Arrival = Tensor | ToDevice | None


class JobHost:
    """The compute side of one job at one plan epoch. `deliver` from the start, `start` once, `stop` at any time.

    With a `stager` (for a device other than the CPU), values are copied to and from the device beside the computation.
    """

    def __init__(
        self,
        assembly: Assembly,
        *,
        threads: int,
        memory: MemoryGuard,
        report: Report,
        upload: Upload,
        stager: Stager | None = None,
    ) -> None:
        self.assembly = assembly
        self._prepare = assembly.prepare
        self.job = assembly.prepare.job
        self.epoch = assembly.prepare.plan.epoch
        self._train = assembly.prepare.train
        self._plan = assembly.prepare.plan
        self._worker = assembly.worker
        self._partition = assembly.partition
        self._programs = assembly.programs
        self._threads = threads
        self._memory = memory
        self._report = report
        self._upload = upload
        self._stager = stager
        self._events: queue.SimpleQueue[tuple[Header, Arrival] | Exception | None] = queue.SimpleQueue()
        self._inbox: Inbox[Arrival] = Inbox()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._route: Route | None = None
        train, plan = self._train, self._plan
        self._first = assembly.first_step
        self._board = TaskBoard(
            self._partition,
            tuple(self._programs),
            schedule=plan.schedule,
            micro_batches=train.micro_batches,
            in_flight=plan.in_flight,
            steps=train.steps,
            clip=train.clip_grad_norm is not None,
            first_step=self._first,
            eval_every=train.eval_every,
            eval_batches=train.eval_batches,
        )
        hosted = tuple(self._programs)
        self._ways = ways(plan, self._partition)
        self._accounts = Accounts(self.job, self.epoch, hosted, train)
        self._pacing = Pacing(self._partition, hosted, self._first)
        # The first step that each fragment is not through with.
        self._floor = dict.fromkeys(hosted, self._first)
        self._patience = Patience(self._prepare.failure_timeout)
        self._uploads: list[Future[None]] = []

    def deliver(self, header: Header, value: Tensor | None) -> None:
        """A message for this job has arrived and was admitted; from any thread."""
        # Norms are put together on the CPU, whatever the device.
        if self._stager is not None and value is not None and header.kind is not FrameKind.NORMS:
            self._events.put((header, self._stager.to_device(value)))
        else:
            self._events.put((header, value))

    def fail(self, error: Exception) -> None:
        """Something that this job needs failed on another thread: the job fails with it."""
        self._events.put(error)

    def start(self, route: Route) -> None:
        """Begin to train."""
        self._route = route
        self._thread = threading.Thread(target=self._main, name="compute", daemon=True)
        self._thread.start()

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

    def _run(self) -> None:
        for fragment in self._programs:
            self._send_parameters(fragment, self._first)
        while not self._board.finished:
            self._drain()
            if self._stopping.is_set():
                return
            task = self._board.next_task()
            if task is None or self._pacing.holds(task):
                self._wait()
                continue
            self._execute(task)
        for upload in self._uploads:
            while not self._stopping.is_set() and not _settled(upload):
                pass
        if not self._stopping.is_set():
            self._report(Finished(job=self.job, epoch=self.epoch))

    def _execute(self, task: Task) -> None:
        begin = perf_counter()
        match task.kind:
            case TaskKind.FORWARD:
                self._forward(task)
            case TaskKind.BACKWARD:
                self._backward(task)
            case TaskKind.UPDATE:
                self._update(task)
            case TaskKind.EVALUATE:
                self._evaluate(task)
        self._accounts.spent(task, perf_counter() - begin)
        self._board.completed(task)
        if task.kind is TaskKind.UPDATE:
            self._updated_step(task)
        if task.kind in (TaskKind.UPDATE, TaskKind.EVALUATE):
            self._advance(task.fragment)

    def _forward(self, task: Task) -> None:
        data = self.assembly.feed.training(task.step, task.micro_batch, self.assembly.placeholders[task.fragment])
        result = self._programs[task.fragment].forward(task.step, task.micro_batch, self._arrivals(task), data)
        for edge, value in result.outputs.items():
            self._pass_on(FrameKind.ACTIVATION, edge, task.step, task.micro_batch, value)
        if result.loss is not None:
            self._accounts.lost(task.step, result.loss)

    def _backward(self, task: Task) -> None:
        gradients = {key[1]: _on_device(self._inbox.take(key)) for key in self._board.needs(task)}
        program = self._programs[task.fragment]
        for edge, gradient in program.backward(task.step, task.micro_batch, gradients).items():
            self._pass_on(FrameKind.GRADIENT, edge, task.step, task.micro_batch, gradient)
        if self._train.clip_grad_norm is not None and task.micro_batch == self._train.micro_batches - 1:
            self._broadcast_norms(task.fragment, task.step, program.norms())

    def _update(self, task: Task) -> None:
        norms: dict[int, Tensor] | None = None
        if self._train.clip_grad_norm is not None:
            norms = {}
            for key in self._board.needs(task):
                value = _on_device(self._inbox.get(key))
                assert value is not None
                norms[key[1]] = value
        total = self._programs[task.fragment].update(task.step, norms)
        if total is not None:
            self._accounts.clipped(task.step, total)
        self._send_parameters(task.fragment, task.step + 1)

    def _evaluate(self, task: Task) -> None:
        data = self.assembly.feed.evaluation(task.micro_batch, self.assembly.placeholders[task.fragment])
        result = self._programs[task.fragment].evaluate(task.step, task.micro_batch, self._arrivals(task), data)
        for edge, value in result.outputs.items():
            self._pass_on(FrameKind.EVALUATION, edge, task.step, task.micro_batch, value)
        report = self._accounts.evaluated(task.step, result.loss) if result.loss is not None else None
        if report is not None:
            self._report(report)

    def _arrivals(self, task: Task) -> dict[int, Tensor]:
        """Edge -> value for a forward or evaluation; borrowed parameters stay for the micro-batches to come."""
        found: dict[int, Tensor] = {}
        for key in self._board.needs(task):
            lasting = self._partition.edges[key[1]].kind == "parameter"
            value = _on_device(self._inbox.get(key) if lasting else self._inbox.take(key))
            assert value is not None
            found[key[1]] = value
        return found

    # What goes out ------------------------------------------------------------------------------------------------

    def _pass_on(self, kind: FrameKind, edge: int, step: int, micro_batch: int, value: Tensor | None) -> None:
        """Give an edge's value to its other end, here or on another worker."""
        way = self._ways[kind is FrameKind.GRADIENT, edge]
        assert self._route is not None
        if value is None:
            header = Header(self.job, self.epoch, kind, edge, step, micro_batch)
        else:
            if value.dtype is not way.dtype or value.shape != way.meta.shape:
                raise misfit(value, way.meta, kind, edge)
            codec, dtype, shape = way.codec, way.meta.dtype, way.meta.shape
            header = Header(self.job, self.epoch, kind, edge, step, micro_batch, codec, dtype, shape)
        if way.to != self._worker:
            staged = value if value is None or self._stager is None else self._stager.to_host(value)
            self._route.send(way.to, header, staged, way.options)
        elif value is not None and way.codec != "none":
            self._accept(header, self._route.encoded(header, value, way.options))
        else:
            self._accept(header, value)

    def _send_parameters(self, fragment: int, step: int) -> None:
        """Tied weights: their value for `step` to the fragments that borrow them."""
        if not self._board.wants_parameters(step):
            return
        for edge, value in self._programs[fragment].parameter_values().items():
            self._pass_on(FrameKind.ACTIVATION, edge, step, 0, value)

    def _broadcast_norms(self, fragment: int, step: int, norms: Tensor) -> None:
        header = Header(self.job, self.epoch, FrameKind.NORMS, fragment, step, 0, "none", "float32", tuple(norms.shape))
        assert self._route is not None
        for worker in self._plan.workers:
            if worker == self._worker:
                self._accept(header, norms)
            else:
                self._route.send(worker, header, norms)

    # What comes in ------------------------------------------------------------------------------------------------

    def _accept(self, header: Header, value: Arrival) -> None:
        if header.kind is FrameKind.DONE:
            self._pacing.heard(header.edge, header.step)
            self._patience.arrived()
        elif self._board.arrived(*header.key):
            self._inbox.put(header.key, value)
            self._patience.arrived()
        else:
            self._patience.duplicated()

    def _drain(self) -> None:
        """Take in everything that has arrived, without waiting."""
        while True:
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return
            self._take_in(event)

    def _take_in(self, event: tuple[Header, Arrival] | Exception | None) -> None:
        if isinstance(event, Exception):
            raise event
        if event is not None:
            self._accept(*event)

    def _wait(self) -> None:
        """Wait for the next arrival; ask again for what is owed when it is long in coming."""
        begin = monotonic()
        event: tuple[Header, Arrival] | Exception | None = None
        try:
            event = self._events.get(timeout=self._patience.left())
        except queue.Empty:
            self._ask_again()
        self._accounts.waited(monotonic() - begin)
        self._take_in(event)

    def _ask_again(self) -> None:
        assert self._route is not None
        task = self._board.next_task()
        paced = self._pacing.owed(task) if task is not None else []
        missing = [(self._source_of(key), key) for key in (*self._board.owed(), *paced)]
        absent = [(source, key) for source, key in missing if source != self._worker]
        for source, (kind, edge, step, micro_batch) in absent:
            self._route.request(
                source, Header(self.job, self.epoch, FrameKind.RESEND, edge, step, micro_batch, kind.name)
            )
        silence = self._patience.asked()
        if silence is not None and absent:
            sources = ", ".join(sorted({source for source, _ in absent}))
            kind, edge, step, micro_batch = absent[0][1]
            self._report(
                Warned(
                    job=self.job,
                    message=f"has waited {format_seconds(silence)} for {sources} "
                    f"({kind.name.lower()} {edge} of step {step}, micro-batch {micro_batch}); still asking",
                )
            )

    def _source_of(self, key: Key) -> str:
        kind, index = key[0], key[1]
        if kind is FrameKind.NORMS:
            return self._plan.placement[index]
        edge = self._partition.edges[index]
        sender = edge.target if kind in (FrameKind.GRADIENT, FrameKind.DONE) else edge.source
        return self._plan.placement[sender]

    # Steps --------------------------------------------------------------------------------------------------------

    def _advance(self, fragment: int) -> None:
        """Let go of what nobody needs any more, now that a fragment may have left a step behind."""
        upcoming = self._board.orders[fragment].peek()
        floor = upcoming.step if upcoming is not None else self._train.steps + 1
        assert self._route is not None
        for step in range(self._floor[fragment], floor):
            for edge in self._pacing.to_say(fragment):
                header = Header(self.job, self.epoch, FrameKind.DONE, edge.index, step, 0)
                to = self._plan.placement[edge.source]
                if to == self._worker:
                    self._accept(header, None)
                else:
                    self._route.send(to, header, None)
        self._floor[fragment] = floor
        lowest = min(self._floor.values())
        self._inbox.close(lowest - 1)
        self._route.forget(lowest - self._pacing.kept_steps)

    def _updated_step(self, task: Task) -> None:
        """After an update: the checkpoint part when one is due, and the report once all fragments here are through."""
        step, train = task.step, self._train
        due = step == train.steps or (train.checkpoint_every and step % train.checkpoint_every == 0)
        if due:
            state = self._programs[task.fragment].state()
            self._uploads = [upload for upload in self._uploads if not upload.done()]
            self._uploads.append(self._upload(step, task.fragment, state))
        if self._accounts.updated(task):
            assert self._route is not None
            used = self._memory.used()
            self._report(self._accounts.step_report(step, self._route.take_sent(), used))
            self._memory.check(used)


def _on_device(arrival: Arrival) -> Tensor | None:
    """On the device, for the thread that computes."""
    return arrival.take() if isinstance(arrival, ToDevice) else arrival


def _settled(upload: Future[None]) -> bool:
    try:
        upload.result(timeout=0.2)
    except TimeoutError:
        return False
    return True
