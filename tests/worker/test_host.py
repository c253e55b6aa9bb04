"""Hosts on real data planes: the bits of a plain loop, whatever the placement, and whatever gets lost on the way."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from worker_cases import MICRO_BATCH, Case, Reports, Stack, loss, make_case

from executor.ordering import Task, TaskKind
from executor.staging import Stager
from fusion.errors import DagError, PlanError
from fusion.messages import (
    BlobRef,
    Commit,
    EvaluationReport,
    Failure,
    Finished,
    PeerAddress,
    Prepare,
    Resume,
    StepReport,
    Warned,
)
from fusion.plan import CodecChoice
from fusion.sampling import SampleOrder
from fusion.sockets import new_keys
from fusion.wire import Header
from worker.jobs.assembly import assemble
from worker.jobs.explain import explain
from worker.jobs.fetch import Fetcher
from worker.jobs.host import JobHost
from worker.machine.memory import MemoryGuard
from worker.protocol.admission import Admission
from worker.transport.mover import Mover
from worker.transport.route import Route
from worker.transport.surroundings import Surroundings

ROOM = MemoryGuard(2**50)


class MemoryFetcher(Fetcher):
    """Blobs from a dict."""

    def __init__(self, blobs: dict[str, bytes]) -> None:
        self._blobs = blobs
        self._max_blob_bytes = 2**40
        self.fetched_bytes = 0

    async def read_range(self, ref: BlobRef, begin: int, end: int) -> Tensor:
        data = self._blobs[ref.digest][begin:end]
        self.fetched_bytes += len(data)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


class Crew:
    """The hosts of one job in this process, each with its own data plane."""

    def __init__(self, case: Case, placement: tuple[str, ...], stager: Stager | None = None, **plan: Any) -> None:
        names = tuple(dict.fromkeys(placement))
        self._turn = threading.Lock()
        self.reports = {name: Reports() for name in names}
        keys = {name: new_keys() for name in names}
        self.movers = {name: Mover(keys[name], lambda _: None) for name in names}
        self.addresses = [
            PeerAddress(
                worker=name,
                endpoint=f"tcp://127.0.0.1:{mover.start('127.0.0.1', 0)}",
                public_key=keys[name].public,
            )
            for name, mover in self.movers.items()
        ]
        self.prepare: Prepare = case.prepare(placement, self.addresses, **plan)
        self.parts: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.hosts: dict[str, JobHost] = {}
        self.routes: dict[str, Route] = {}
        for name, mover in self.movers.items():
            mover.admit(self.addresses)
            assembly, pieces = asyncio.run(assemble(self.prepare, name, "cpu", MemoryFetcher(case.blobs), ROOM))
            report = self.reports[name]
            host = JobHost(assembly, pieces, threads=1, memory=ROOM, report=report, upload=self._upload, stager=stager)
            host._execute = self._in_turn(host._execute)  # type: ignore[method-assign]
            self.hosts[name] = host
        for name, mover in self.movers.items():
            peers = [address for address in self.addresses if address.worker != name]
            host = self.hosts[name]
            self.routes[name] = mover.open(
                host.assembly.admission(),
                peers,
                host.deliver,
                places=host.places,
                on_error=host.fail,
                on_spoilt=host.spoilt,
            )

    def _in_turn(self, execute: Callable[[Task], None]) -> Callable[[Task], None]:
        """Real workers are processes, each with a random generator of its own; here they share one and take turns."""

        def run(task: Task) -> None:
            with self._turn:
                execute(task)

        return run

    def _upload(self, step: int, fragment: int, state: dict[str, Tensor]) -> Future[None]:
        self.parts[step, fragment] = state
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def start(self) -> None:
        for name, host in self.hosts.items():
            host.start(self.routes[name])

    def finish(self) -> None:
        for name, reports in self.reports.items():
            ended = reports.wait(Finished, Failure)
            assert isinstance(ended, Finished), f"{name}: {ended}"

    def close(self) -> None:
        for host in self.hosts.values():
            host.stop()
        for mover in self.movers.values():
            mover.close()

    def steps(self) -> list[StepReport]:
        """The reports that carry the loss."""
        return [r for reports in self.reports.values() for r in reports.of(StepReport) if r.loss is not None]

    def state(self, step: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for (at, _), part in self.parts.items():
            if at == step:
                found |= part
        return found


@contextmanager
def crew(case: Case, placement: tuple[str, ...], **plan: Any) -> Iterator[Crew]:
    torch.set_num_threads(1)
    made = Crew(case, placement, **plan)
    try:
        yield made
    finally:
        made.close()


def train(case: Case, placement: tuple[str, ...], **plan: Any) -> Crew:
    with crew(case, placement, **plan) as made:
        made.start()
        made.finish()
    return made


def plain_loop(case: Case, model: nn.Module) -> tuple[list[float], dict[str, Tensor]]:
    """Ordinary PyTorch, for models without random operators."""
    torch.set_num_threads(1)
    config = case.train
    model.load_state_dict({name: case.tensors[name] for name in model.state_dict()})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    order = SampleOrder(config.seed, len(case.data["inputs"]) - 2 * MICRO_BATCH, config.micro_batches, MICRO_BATCH)
    losses = []
    for step in range(1, config.steps + 1):
        from executor.learning_rate import factor

        total = 0.0
        optimizer.zero_grad()
        for micro_batch in range(config.micro_batches):
            samples = torch.from_numpy(order.micro_batch(step, micro_batch))
            value = loss(model(case.data["inputs"][samples]), case.data["targets"][samples])
            (value / config.micro_batches).backward()
            total += value.item()
        losses.append(total / config.micro_batches)
        if config.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, config.clip_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * factor(config.lr_schedule, step, config.steps)
        optimizer.step()
    return losses, dict(model.state_dict())


def test_the_trace_of_a_step_fits_together_across_workers() -> None:
    """Each value arrives after its maker was done, and before what needs it begins; both by the calendar's clock."""
    case = make_case(Stack(dropout=0.0), steps=2)
    made = train(case, ("a", "b"))
    ran: dict[tuple[str, int, int], tuple[float, float]] = {}
    arrived: dict[tuple[str, int, int], float] = {}
    for reports in made.reports.values():
        trace = next(report.trace for report in reports.of(StepReport) if report.step == 2)
        assert trace is not None
        for kind, fragment, micro_batch, begin, end in trace.tasks:
            ran[kind, fragment, micro_batch] = (trace.begun + begin, trace.begun + end)
        for what, fragment, micro_batch, at, _ in trace.arrivals:
            arrived[what, fragment, micro_batch] = trace.begun + at
    slack = 0.005  # each worker reads the calendar's clock once
    for micro_batch in range(case.train.micro_batches):
        assert ran["forward", 0, micro_batch][0] <= arrived["activation", 0, micro_batch] + slack
        assert arrived["activation", 0, micro_batch] <= ran["forward", 1, micro_batch][0] + slack
        assert ran["backward", 1, micro_batch][0] <= arrived["gradient", 1, micro_batch] + slack
        assert arrived["gradient", 1, micro_batch] <= ran["backward", 0, micro_batch][0] + slack
    assert {kind for kind, _, _ in ran} == {"forward", "backward", "weights", "update"}


PLACEMENTS = [("a",), ("a", "b"), ("a", "b", "c"), ("a", "b", "a"), ("a", "b", "b", "a")]


@pytest.mark.parametrize("placement", PLACEMENTS, ids="-".join)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_losses_and_weights_are_those_of_a_plain_loop(placement: tuple[str, ...], tied: bool) -> None:
    case = make_case(Stack(tied=tied, dropout=0.0), clip=0.05, eval_every=2, steps=5)
    losses, weights = plain_loop(case, Stack(tied=tied, dropout=0.0))
    made = train(case, placement)
    assert [report.loss for report in made.steps()] == losses
    final = made.state(5)
    for name, value in weights.items():
        if f"parameter/{name}" in final:
            assert torch.equal(final[f"parameter/{name}"], value), name
    assert sum(key.startswith("parameter/") for key in final) == len({v.data_ptr() for v in weights.values()})
    evaluations = [e for reports in made.reports.values() for e in reports.of(EvaluationReport)]
    assert [(e.step, e.batches) for e in evaluations] == [(2, 2), (4, 2)]


@pytest.fixture(scope="module")
def dropout_run() -> tuple[Case, list[StepReport], dict[str, Tensor]]:
    case = make_case(Stack(dropout=0.3), clip=1.0, steps=6, checkpoint_every=3)
    made = train(case, ("a", "a", "a"))
    return case, made.steps(), made.state(6)


def same_bits(made: Crew, expected: tuple[Case, list[StepReport], dict[str, Tensor]]) -> None:
    _, steps, state = expected
    losses = {report.step: report.loss for report in steps}
    assert all(report.loss == losses[report.step] for report in made.steps())
    final = made.state(6)
    assert final.keys() == state.keys()
    assert all(torch.equal(final[key], state[key]) for key in state)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_dropout_and_schedules_give_the_same_bits_everywhere(dropout_run: Any, schedule: str) -> None:
    made = train(dropout_run[0], ("a", "b", "c"), schedule=schedule)
    same_bits(made, dropout_run)
    report = made.steps()[0]
    assert report.sent_bytes == sum(report.sent_to.values()) > 0
    assert report.memory_used_bytes > 0
    assert report.gradient_norm is not None


def test_a_resumed_run_goes_on_with_the_same_bits(dropout_run: Any) -> None:
    import safetensors.torch

    case = dropout_run[0]
    half = train(case, ("a", "b", "c")).state(3)
    weights = {**case.tensors, **{k.removeprefix("parameter/"): v for k, v in half.items() if k[0] == "p"}}
    moments = {key: value for key, value in half.items() if key.startswith("optimizer/")}
    resumed = Case(case.dag, weights, case.data, case.train)
    optimizer = resumed.add(safetensors.torch.save(moments))
    made = train(resumed, ("b", "a", "a"), resume=Resume(step=3, optimizer=optimizer))
    assert [report.step for report in made.steps()] == [4, 5, 6]
    same_bits(made, dropout_run)


def lossy(route: Route, seed: int) -> None:
    """Loses every fifth message on average, requests and answers among them."""
    chance = random.Random(seed)
    for peer in route.connections.values():
        transmit = peer.transmit

        def sometimes(header: bytes, payload: memoryview | None, transmit: Any = transmit) -> int:
            return 0 if chance.random() < 0.2 else int(transmit(header, payload))

        peer.transmit = sometimes  # type: ignore[method-assign]


@contextmanager
def interrupted(made: Crew) -> Iterator[None]:
    """Everybody hears something that is not what they wait for, ten times as often as they would ask."""
    over = threading.Event()

    def interrupt() -> None:
        while not over.wait(0.005):
            for host in made.hosts.values():
                host.post(Commit(job=made.prepare.job, epoch=made.prepare.plan.epoch, step=0))

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("around", [nullcontext, interrupted])
def test_lost_messages_are_asked_for_again(dropout_run: Any, around: Any) -> None:
    with crew(dropout_run[0], ("a", "b", "c"), failure_timeout=0.1) as made:
        for seed, route in enumerate(made.routes.values()):
            lossy(route, seed)
        with around(made):
            made.start()
            made.finish()
    same_bits(made, dropout_run)


def test_a_frozen_stem_is_paced_by_those_it_feeds() -> None:
    """Nothing comes back to it: without pacing it would send all steps at once."""
    case = make_case(Stack(frozen=3, dropout=0.0), steps=12)
    losses, _ = plain_loop(case, Stack(frozen=3, dropout=0.0))
    with crew(case, ("a", "b"), failure_timeout=0.5) as made:
        made.hosts["a"].start(made.routes["a"])
        held = made.reports["a"].wait(Warned)
        assert "waited" in held.message
        assert max(report.step for report in made.reports["a"].of(StepReport)) == 2
        made.hosts["b"].start(made.routes["b"])
        made.finish()
    assert [report.loss for report in made.steps()] == losses


def test_lossy_codecs_give_the_same_bits_on_one_worker_and_on_two() -> None:
    case = make_case(steps=3)
    edge = next(e.index for e in partition_in_two(case).edges)
    codecs = {edge: CodecChoice(forward="int8", backward="bf16")}
    apart, together = (train(case, placement, codecs=codecs) for placement in (("a", "b"), ("a", "a")))
    plain = train(case, ("a", "b"))
    assert [r.loss for r in apart.steps()] == [r.loss for r in together.steps()]
    assert [r.loss for r in apart.steps()] != [r.loss for r in plain.steps()]


def partition_in_two(case: Case) -> Any:
    from dag.cut import cut

    return cut(case.dag, case.prepare(("a", "b")).plan.cuts)


class FakeRuntime:
    """A device whose streams are in order already; counts the copies to the host."""

    def __init__(self) -> None:
        self.copies = 0

    def new_stream(self) -> Any:
        return SimpleNamespace(wait_event=lambda _: None)

    current_stream = new_stream

    def running_on(self, stream: Any) -> Any:
        return nullcontext()

    def record_event(self, stream: Any) -> Any:
        return SimpleNamespace(synchronize=lambda: None, query=lambda: True)

    def keep_until(self, tensor: Tensor, stream: Any) -> None:
        self.copies += 1

    def pinned(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype)


def test_values_pass_through_staging_on_a_device() -> None:
    case = make_case(Stack(tied=True, dropout=0.0), clip=0.05, steps=3)
    losses, _ = plain_loop(case, Stack(tied=True, dropout=0.0))
    runtime = FakeRuntime()
    made = train(case, ("a", "b", "a"), stager=Stager(torch.device("cpu"), runtime))
    assert [report.loss for report in made.steps()] == losses
    assert runtime.copies > 10


class Resting(Surroundings):
    """Slow by a fixed time a task."""

    def rest(self, busy: float, elapsed: float) -> float:
        assert busy >= 0
        assert elapsed > 0
        return 0.02


def test_a_worker_that_is_to_be_slow_rests_after_each_task() -> None:
    case = make_case(Stack(dropout=0.0), steps=3)
    losses, _ = plain_loop(case, Stack(dropout=0.0))
    with crew(case, ("a", "b")) as made:
        made.hosts["b"]._surroundings = Resting()
        made.start()
        made.finish()
    assert [report.loss for report in made.steps()] == losses
    for report in made.reports["b"].of(StepReport):
        (times,) = report.fragments
        assert min(times.forward, times.backward) >= 0.02 * case.train.micro_batches
        assert times.update >= 0.02


@pytest.mark.parametrize(("due", "one_by_one"), [(1e-3, False), (0.03, True)])
def test_gradients_of_weights_are_rested_for_when_enough_is_due(due: float, one_by_one: bool) -> None:
    """A rest after each op would leave the caches cold each time, and the worker slower than it is to be."""
    case = make_case(Stack(8, dropout=0.0), steps=1)
    with crew(case, ("a", "b")) as made:
        host = made.hosts["b"]
        host._surroundings = cast(Any, SimpleNamespace(rest=lambda busy, elapsed: due))
        run, execute = host._runner.run, host._execute
        ops: list[int] = []

        def counted(task: Task) -> bool:
            ops[-1] += task.kind is TaskKind.WEIGHTS
            return run(task)

        def executed(task: Task) -> None:
            ops.append(0)
            execute(task)

        host._runner.run, host._execute = counted, executed
        made.start()
        made.finish()
    assert sum(ops) > case.train.micro_batches
    assert (max(ops) == 1) == one_by_one


def test_a_value_that_can_not_be_encoded_fails_the_job() -> None:
    case = make_case(steps=2)
    with crew(case, ("a", "b"), codecs={0: CodecChoice(forward="int8")}) as made:
        made.hosts["a"]._runner._ways[False, 0].options["block"] = -1.0
        made.start()
        failure = made.reports["a"].wait(Failure)
    assert "block" in failure.message


def expecting_bfloat16(made: Crew, name: str) -> Admission:
    """The rules of a worker that takes the plan to have another codec than its peers do."""
    assembly = made.hosts[name].assembly
    codecs = {edge.index: CodecChoice(forward="bf16") for edge in assembly.partition.edges}
    return assembly.admission(made.prepare.plan.model_copy(update={"codecs": codecs}))


def test_a_value_that_is_refused_each_time_ends_the_job_in_words() -> None:
    """Its sender answers every question with the same bytes: without an end, both would ask and answer for ever."""
    case = make_case(steps=2)
    with crew(case, ("a", "b"), failure_timeout=0.1) as made:
        made.routes["b"].admission = expecting_bfloat16(made, "b")
        made.start()
        failure = made.reports["b"].wait(Failure)
    assert failure.message.startswith(
        "a has sent activation 0 of step 1, micro-batch 0, 3 times in a form that is refused"
    )
    assert "the plan says bf16" in failure.message
    assert failure.detail == ""
    assert made.movers["b"].refused["layout"] >= 3


def test_a_value_that_is_refused_now_and_then_is_asked_for_again() -> None:
    case = make_case(Stack(dropout=0.0), steps=3)
    losses, _ = plain_loop(case, Stack(dropout=0.0))
    with crew(case, ("a", "b"), failure_timeout=0.1) as made:
        route = made.routes["b"]
        right, route.admission = route.admission, expecting_bfloat16(made, "b")

        def spoilt(header: Header, sender: str, why: str) -> None:
            made.hosts["b"].spoilt(header, sender, why)
            route.admission = right

        route.on_spoilt = spoilt
        made.start()
        made.finish()
    assert [report.loss for report in made.steps()] == losses


def test_an_error_of_the_computation_becomes_a_failure_in_one_line() -> None:
    case = make_case(steps=2)
    with crew(case, ("a",)) as made:
        program = made.hosts["a"]._pieces[0].program

        def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("first line\nsecond line")

        program.forward = broken  # type: ignore[method-assign, assignment]
        made.start()
        failure = made.reports["a"].wait(Failure)
    assert failure.message == "RuntimeError: first line second line"
    assert "Traceback" in failure.detail


def test_memory_limits_are_said_in_words() -> None:
    case = make_case()
    prepare = case.prepare(("a",))
    with pytest.raises(PlanError, match=r"fragment 0 would take .* the limit is 1\.0 KiB"):
        asyncio.run(assemble(prepare, "a", "cpu", MemoryFetcher(case.blobs), MemoryGuard(1024)))
    with crew(case, ("a",)) as made:
        made.hosts["a"]._memory = MemoryGuard(1024)
        made.start()
        failure = made.reports["a"].wait(Failure)
    assert "raise --memory-limit" in failure.message
    assert failure.detail == ""
    assert "smaller micro_batch" in explain(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))


def test_a_dag_that_is_not_allowed_is_refused() -> None:
    case = make_case()
    prepare = case.prepare(("a",))
    blob = case.add(b"not a dag")
    with pytest.raises(DagError):
        asyncio.run(
            assemble(
                prepare.model_copy(update={"dag": blob}), "a", "cpu", MemoryFetcher(case.blobs), MemoryGuard(2**50)
            )
        )


def test_stopping_ends_a_host_that_waits() -> None:
    case = make_case()
    with crew(case, ("a", "b")) as made:
        made.hosts["a"].start(made.routes["a"])
        made.hosts["a"].stop()
        made.hosts["a"].stop()
        assert not made.reports["a"].of(Failure)


def test_a_value_that_is_not_what_the_dag_says_fails_where_it_is_made() -> None:
    case = make_case(steps=2)
    with crew(case, ("a", "b")) as made:
        runner = made.hosts["a"]._runner
        way = next(iter(runner._ways.values()))
        runner._ways = dict.fromkeys(runner._ways, replace(way, meta=replace(way.meta, shape=(1, 2))))
        made.start()
        failure = made.reports["a"].wait(Failure)
    assert "came out as torch.float32[2, 6], the OP-DAG says float32[1, 2]" in failure.message
