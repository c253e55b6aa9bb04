"""Carries out tasks: feeds the fragments' programs with what has arrived, and passes on what they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pydantic import BaseModel
from torch import Tensor

from compress import edge_seed
from executor.ordering import Task, TaskKind
from executor.staging import Stager
from fusion.wire import FrameKind, Header
from worker.jobs.assembly import Assembly, Piece
from worker.jobs.side_by_side import SideBySide
from worker.protocol.accounts import Accounts
from worker.protocol.session import Session
from worker.transport.arrival import Arrival, on_device, present
from worker.transport.parcel import Parcel
from worker.transport.sent_places import SentPlaces
from worker.transport.ways import misfit, ways

EMPTY = Parcel(None)


class TaskRunner:
    """Used by the compute thread alone. `pieces` are those of the fragments that are here: their owner changes them.

    `encode` has a parcel encoded beside the computation; `report` is told of evaluations; `beside` computes what is replayed
    several micro-batches at a time.
    """

    def __init__(
        self,
        assembly: Assembly,
        pieces: Mapping[int, Piece],
        session: Session[Parcel],
        accounts: Accounts,
        stager: Stager | None,
        encode: Callable[[Parcel], None],
        report: Callable[[BaseModel], None],
        beside: SideBySide | None = None,
    ) -> None:
        self._job = assembly.prepare.job
        self._worker = assembly.worker
        self._train = assembly.prepare.train
        self._edges = assembly.partition.edges
        self._ways = ways(assembly.prepare.plan, assembly.partition)
        self._pieces = pieces
        self._session = session
        self._accounts = accounts
        self._stager = stager
        self._encode = encode
        self._report = report
        self._beside = beside
        self.sent = SentPlaces()
        """What gradients are still to come for."""

    def run(self, task: Task) -> bool:
        """Compute it; what it makes is given to the session. False when it is to be taken up again: WEIGHTS go op by op."""
        match task.kind:
            case TaskKind.FORWARD:
                self._forward(task)
            case TaskKind.BACKWARD:
                self._backward(task)
            case TaskKind.WEIGHTS:
                if self._pieces[task.fragment].program.weights(task.step, task.micro_batch):
                    return False
            case TaskKind.UPDATE:
                self._update(task)
            case TaskKind.EVALUATE:
                self._evaluate(task)
        if self._train.clip_grad_norm is not None and self._session.board.completes_gradients(task):
            self._tell_norms(task)
        return True

    def lend_parameters(self, fragment: int, step: int) -> None:
        """Give the fragment's tied parameters to those who borrow them in this step."""
        for edge, value in self._pieces[fragment].program.parameter_values().items():
            self._pass_on(fragment, FrameKind.ACTIVATION, edge, step, 0, value)

    def _forward(self, task: Task) -> None:
        piece = self._pieces[task.fragment]
        whole = None if self._beside is None else self._beside.forward(task)
        arrivals = self._arrivals(task)
        if whole is not None:
            result = whole.forward
        else:
            data = piece.feed.training(task.step, task.micro_batch, piece.placeholders)
            postpone = self._session.board.postpones(task.fragment)
            values = present(arrivals)
            result = piece.program.forward(task.step, task.micro_batch, values, data, postpone=postpone)
        for edge, value in result.outputs.items():
            self._pass_on(task.fragment, FrameKind.ACTIVATION, edge, task.step, task.micro_batch, value)
        if result.loss is not None:
            self._accounts.lost(task.fragment, task.step, result.loss)

    def _backward(self, task: Task) -> None:
        inbox, board = self._session.inbox, self._session.board
        gradients = {key[1]: inbox.take(key) for key in board.needs(task)}
        for _, edge, step, micro_batch in board.needs(task):
            self.sent.drop(edge, step, micro_batch)
        program = self._pieces[task.fragment].program
        whole = None if self._beside is None else self._beside.backward(task)
        if whole is not None:
            program.add_up(whole)
            returned = whole.returned
        else:
            values = {edge: on_device(gradient) for edge, gradient in gradients.items()}
            returned = program.backward(task.step, task.micro_batch, values)
        for edge, gradient in returned.items():
            self._pass_on(task.fragment, FrameKind.GRADIENT, edge, task.step, task.micro_batch, gradient)

    def _tell_norms(self, task: Task) -> None:
        norms = self._pieces[task.fragment].program.norms()
        shape = tuple(norms.shape)
        header = Header(
            self._job, self._session.epoch, FrameKind.NORMS, task.fragment, task.step, 0, "none", "float32", shape
        )
        self._session.emit(header, Parcel(norms))

    def _update(self, task: Task) -> None:
        norms: dict[int, Tensor] | None = None
        if self._train.clip_grad_norm is not None:
            norms = {}
            for key in self._session.board.needs(task):
                value = on_device(self._session.inbox.get(key))
                assert value is not None
                norms[key[1]] = value
        total = self._pieces[task.fragment].program.update(task.step, norms)
        if total is not None:
            self._accounts.clipped(task.step, total)

    def _evaluate(self, task: Task) -> None:
        piece = self._pieces[task.fragment]
        data = piece.feed.evaluation(task.micro_batch, piece.placeholders)
        result = piece.program.evaluate(task.step, task.micro_batch, present(self._arrivals(task)), data)
        for edge, value in result.outputs.items():
            self._pass_on(task.fragment, FrameKind.EVALUATION, edge, task.step, task.micro_batch, value)
        if result.loss is not None:
            report = self._accounts.evaluated(self._session.epoch, task.fragment, task.step, result.loss)
            if report is not None:
                self._report(report)

    def _arrivals(self, task: Task) -> dict[int, Arrival]:
        """By edge, for a forward or evaluation; borrowed parameters stay for the micro-batches to come."""
        inbox, edges = self._session.inbox, self._edges
        found: dict[int, Arrival] = {}
        for key in self._session.board.needs(task):
            arrival = found[key[1]] = inbox.get(key) if edges[key[1]].kind == "parameter" else inbox.take(key)
            if task.kind is TaskKind.FORWARD and self._ways[True, key[1]].reuses:
                self._pieces[task.fragment].keep_places(key[1], task.step, task.micro_batch, arrival)
        return found

    def _pass_on(
        self, fragment: int, kind: FrameKind, edge: int, step: int, micro_batch: int, value: Tensor | None
    ) -> None:
        """Give an edge's value to its other end, here or on another worker."""
        backward, piece = kind is FrameKind.GRADIENT, self._pieces[fragment]
        places = piece.places.pop((edge, step, micro_batch), None) if backward else None
        if value is None:
            self._session.emit(Header(self._job, self._session.epoch, kind, edge, step, micro_batch), EMPTY)
            return
        way = self._ways[backward, edge]
        if value.dtype is not way.dtype or value.shape != way.meta.shape:
            raise misfit(value, way.meta, kind, edge)
        header = Header(
            self._job, self._session.epoch, kind, edge, step, micro_batch, way.codec, way.meta.dtype, way.meta.shape
        )
        seed = 0
        if way.codec != "none":
            seed = edge_seed(self._train.seed, step, micro_batch, edge, gradient=backward)
        staged = None
        if self._stager is not None and self._session.dispatch.receivers(kind, edge) != (self._worker,):
            staged = self._stager.to_host(value)
        if kind is not FrameKind.EVALUATION and (backward, edge) in piece.feedback:
            parcel = piece.feedback.parcel(backward, edge, value, seed, staged, places)
            self._encode(parcel)
        else:
            parcel = Parcel(value, way.codec, way.options, seed, staged, places=places)
        if kind is FrameKind.ACTIVATION and self._ways[True, edge].reuses:
            self.sent.put(header, parcel)
        self._session.emit(header, parcel)
