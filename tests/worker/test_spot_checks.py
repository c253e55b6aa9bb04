"""Real workers in spot checks, with a scripted coordinator: honest ones come to the same digests, and a lie shows where it was told."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from fake_coordinator import FakeCoordinator
from pool_cases import Running, launch, pool, ready_job
from worker_cases import Case, Stack, make_case, partition_of

from executor.program import FragmentProgram
from fusion.messages import Check, CheckpointPart, CheckVoid, Digest, Finished, Prepare, Receipts, Replayed, StepReport
from fusion.plan import CodecChoice
from fusion.wire import FrameKind, Header
from worker.jobs.host import JobHost
from worker.protocol.session import Session
from worker.transport.parcel import Parcel

STEPS = 4
PLACEMENT = ("a", "b", "c", "a")
LOSSY = {
    1: CodecChoice(forward="int8", backward="topk", options={"ratio": 3.0}, error_feedback=True),
    2: CodecChoice(forward="topk", backward="topk-reused", options={"ratio": 3.0}, error_feedback=True),
}


@pytest.fixture
async def coordinator() -> AsyncIterator[FakeCoordinator]:
    made = FakeCoordinator()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture(scope="module")
def case() -> Case:
    """Tied weights that cross fragments, some of them on one worker; clipping, evaluation, checkpoints."""
    return make_case(
        Stack(tied=True, dropout=0.0), clip=0.05, eval_every=2, steps=STEPS, checkpoint_every=2, micro_batches=3
    )


def keyed(digests: list[Digest]) -> dict[tuple[str, int, int, int], str]:
    return {(kind, edge, step, batch): digest for kind, edge, step, batch, digest in digests}


async def checked(
    coordinator: FakeCoordinator, prepare: Prepare, fragment: int, checker: str, *, exact: bool = True
) -> tuple[Replayed, dict[str, Receipts]]:
    """Have this fragment checked from the start to the end, and hear everybody."""
    order = Check(
        job=prepare.job,
        epoch=0,
        fragment=fragment,
        checker=checker,
        after=0,
        through=STEPS,
        exact=exact,
    )
    for name in prepare.plan.workers:
        coordinator.send(name, order)

    def of(kind: type[Any]) -> dict[str, Any]:
        return {
            who.partition("#")[0]: said
            for who, said in coordinator.messages
            if isinstance(said, kind) and said.fragment == fragment
        }

    await coordinator.until(lambda: of(CheckVoid) or (len(of(Receipts)) == 3 and of(Replayed)))
    assert not of(CheckVoid)
    assert set(of(Replayed)) == {checker}
    return of(Replayed)[checker], of(Receipts)


async def trained(coordinator: FakeCoordinator, case: Case, codecs: Mapping[int, CodecChoice] = {}) -> Prepare:
    prepare = await ready_job(coordinator, case, PLACEMENT, log_bytes=2**28, codecs=codecs, verify=True)
    launch(coordinator, prepare)
    for name in prepare.plan.workers:
        await coordinator.message(name, Finished)
    return prepare


async def test_honest_workers_come_to_the_same_digests(coordinator: FakeCoordinator, case: Case) -> None:
    """Over a lossy edge with error feedback, plain ones, and edges within one worker."""
    async with pool(coordinator, "a", "b", "c"):
        prepare = await trained(coordinator, case, LOSSY)
        # Between unlike machines the host shows its values, to be compared as such.
        for fragment, checker, exact in ((1, "a", True), (2, "b", False), (0, "c", True), (3, "b", True)):
            rerun, receipts = await checked(coordinator, prepare, fragment, checker, exact=exact)
            assert rerun.deviation == 0.0
            host, made = PLACEMENT[fragment], keyed(rerun.made)
            got = {name: keyed(told.got) for name, told in receipts.items() if name != host}
            assert all(told.items() <= made.items() for told in got.values())
            assert any(got.values())
            used = keyed(receipts[host].used)
            shown = {key: digest for told in rerun.used.values() for key, digest in keyed(told).items()}
            assert used.items() <= shown.items()
            parts = {
                message.step: message.blob.digest[:32]
                for _, message in coordinator.messages
                if isinstance(message, CheckpointPart) and message.fragment == fragment
            }
            assert rerun.states == parts
            assert set(parts) == {2, 4}
        told = {m.step: m.loss for _, m in coordinator.messages if isinstance(m, StepReport) and m.loss is not None}
        assert rerun.losses == told


async def test_a_lie_shows_where_it_was_told(
    coordinator: FakeCoordinator, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Session.emit

    def lie(self: Session[Parcel], header: Header, parcel: Parcel) -> None:
        if self.dispatch.source(header.kind, header.edge) == 1 and header.key[2:] == (3, 2):
            value = parcel.received()
            if header.kind is FrameKind.GRADIENT and value is not None:
                parcel = Parcel(value * 1.5)
        honest(self, header, parcel)

    monkeypatch.setattr(Session, "emit", lie)
    async with pool(coordinator, "a", "b", "c") as workers:
        prepare = await trained(coordinator, case)
        checks = _host(workers[1])._checks
        assert checks is not None
        edge = next(edge.index for edge in partition_of(prepare, case).edges if (edge.source, edge.target) == (1, 2))
        asked = Header(prepare.job, 0, FrameKind.SHOW, edge, 2, 0, "ACTIVATION")
        assert checks._witness.show(asked, "c") is None, "nobody checks anything"
        for fragment, checker, lies in ((1, "c", True), (0, "c", False), (2, "b", False)):
            rerun, receipts = await checked(coordinator, prepare, fragment, checker)
            made = keyed(rerun.made)
            told = {
                key: digest
                for name, receipt in receipts.items()
                if name != PLACEMENT[fragment]
                for key, digest in keyed(receipt.got).items()
            }
            false = {key[0::2] + key[3:] for key in told if made[key] != told[key]}
            assert min(false, default=None, key=lambda key: key[1:]) == (("GRADIENT", 3, 2) if lies else None)
            # A value is shown to whoever needs it for a check, as long as there is one.
            assert checks._witness.show(asked, "c") is not None
            assert checks._witness.show(asked, "a") is None


def _host(worker: Running) -> JobHost:
    run = worker.service._run
    assert run is not None
    assert run._parts is not None
    return run._parts.host


async def test_a_loss_that_is_no_number_is_found_again(
    coordinator: FakeCoordinator, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = FragmentProgram.forward

    def overflowing(self: FragmentProgram, step: int, micro_batch: int, *rest: Any, **options: Any) -> Any:
        result = forward(self, step, micro_batch, *rest, **options)
        return result if step != 2 or micro_batch != 1 or result.loss is None else replace(result, loss=math.nan)

    monkeypatch.setattr(FragmentProgram, "forward", overflowing)
    async with pool(coordinator, "a", "b", "c"):
        prepare = await trained(coordinator, case)
        rerun, _ = await checked(coordinator, prepare, 3, "b")
        told = {m.step: m.loss for _, m in coordinator.messages if isinstance(m, StepReport) and m.loss is not None}
        assert rerun.losses.keys() == told.keys()
        assert {step: str(loss) for step, loss in rerun.losses.items()} == {
            step: str(loss) for step, loss in told.items()
        }
        assert not math.isfinite(told[2])
