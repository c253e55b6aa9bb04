"""Spot checks: what is drawn, who is asked, what their words come to, and that nothing waits for them for ever."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import repeat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recovery_cases import Play

from coordinator.entry.entrance import NameTakenError, admit
from coordinator.life import events as ev
from coordinator.life.accusations import impartial_first, liar
from coordinator.life.inspection import TOLERANCE, SpotCheck, judge
from fusion.messages import (
    Backup,
    BlobRef,
    Check,
    CheckpointPart,
    CheckVoid,
    Commit,
    Device,
    Digest,
    JoinRequest,
    Prepare,
    Ready,
    Receipts,
    Replayed,
    Shutdown,
)
from fusion.spec import VerifySpec

TRUE, FALSE = "0" * 32, "f" * 32


class Checked(Play):
    """A job with spot checks of this `fraction`; `draws` are the random numbers to come."""

    def __init__(self, fraction: float = 1.0, draws: Iterable[float] = (), **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.job.spec = self.job.spec.model_copy(update={"verify": VerifySpec(fraction=fraction)})
        numbers: Iterator[float] = iter(draws) if draws else repeat(0.0)
        self.lifecycle._recovery._checks._draw = numbers.__next__

    def round(self) -> Backup:
        """Train through a round, until its snapshots are held and everybody is past it."""
        step = self.run.highest + 1
        while not (orders := self.sent(Backup)):
            self.train(step, step)
            step += 1
        order = next(iter(orders.values()))
        self.train(step, order.step)
        self.hold_all(order)
        self.train(order.step + 1, order.step + 1)
        return order

    def orders(self) -> list[Check]:
        """The checks that were ordered since the last call; everybody was told of each."""
        told: dict[str, list[Check]] = {name: [] for name in self.job.hosts}
        names = {incarnation: name for name, incarnation in self.job.hosts.items()}
        for each in self.out:
            if isinstance(each, ev.Send) and isinstance(each.message, Check):
                told[names[each.incarnation]].append(each.message)
        self.out = [each for each in self.out if not (isinstance(each, ev.Send) and isinstance(each.message, Check))]
        first, *others = told.values()
        assert all(other == first for other in others)
        return first

    def testify(self, check: Check, got: str = TRUE, state: str = TRUE) -> None:
        """All but the checker say what they know; its neighbour in the alphabet got one value of the fragment."""
        host = self.plan.placement[check.fragment]
        for name in list(self.job.hosts):
            told = [told_value(check.through, got)] if name not in (host, check.checker) else []
            held = state if name == check.checker else ""
            self.say(name, receipts(check, got=told, state=held))

    def rerun(self, check: Check, value: str = TRUE, state: str = TRUE) -> None:
        self.say(check.checker, replayed(check, [told_value(check.through, value)], {check.through: state}))

    def go_on(self) -> None:
        """The job has gone back: it is planned as it was, or over who is left, and everybody is ready."""
        asked = self.asked_plan()
        assert asked.previous is not None
        left = asked.workers
        placement = tuple(host if host in left else left[0] for host in asked.previous.placement)
        self.answer(asked, placement)
        for name in list(self.job.hosts):
            self.say(name, Ready(job="job", epoch=self.job.epoch))
        assert self.job.state == "running"

    def find(self, fragment: int) -> Check:
        """Go through a round and find that the fragment's host lies; returns the check that says so."""
        self.round()
        check = next(check for check in self.orders() if check.fragment == fragment)
        alone = len(self.job.hosts) == 2
        self.testify(check, got=FALSE, state=FALSE if alone else TRUE)
        for other in self.run.inspection.checks if self.run.inspection else ():
            if other.fragment != fragment:
                other.void = "not asked"
        self.rerun(check)
        return check

    def counts(self) -> tuple[int, int, int]:
        return self.job.checks_passed, self.job.checks_failed, self.job.checks_void


def told_value(step: int, digest: str, edge: int = 1) -> Digest:
    return ("ACTIVATION", edge, step, 0, digest)


def receipts(check: Check, got: list[Digest] = [], used: list[Digest] = [], state: str = "") -> Receipts:  # noqa: B006
    return Receipts(
        job="job", epoch=check.epoch, fragment=check.fragment, through=check.through, got=got, used=used, state=state
    )


def replayed(
    check: Check,
    made: list[Digest],
    states: dict[int, str],
    used: dict[str, list[Digest]] | None = None,
    deviation: float = 0.0,
) -> Replayed:
    return Replayed(
        job="job",
        epoch=check.epoch,
        fragment=check.fragment,
        through=check.through,
        made=made,
        states=states,
        used=used or {},
        deviation=deviation,
    )


def test_a_step_counts_when_its_checks_have_passed_and_no_sooner() -> None:
    play = Checked()
    order = play.round()
    checks = play.orders()
    assert [(check.fragment, check.checker, check.after) for check in checks] == [(0, "b", 0), (1, "c", 0), (2, "a", 0)]
    assert {check.through for check in checks} == {order.step}
    for check in checks:
        assert play.metrics() == []
        assert not play.sent(Commit)
        play.testify(check)
        play.rerun(check)
    assert play.metrics() == list(range(1, order.step + 1))
    assert set(play.sent(Commit)) == set("abc")
    assert (play.counts(), play.run.common_step) == ((3, 0, 0), order.step)
    # From here on, the holders of the common snapshot check.
    after = play.round()
    assert [(check.after, check.through) for check in play.orders()] == 3 * [(order.step, after.step)]


def test_the_share_that_is_drawn_is_checked_and_without_a_share_nothing_is() -> None:
    play = Checked(0.01, draws=[0.5, 0.009, 0.01])
    play.round()
    assert [check.fragment for check in play.orders()] == [1]
    play = Checked(0.0)
    order = play.round()
    assert not play.orders()
    assert play.run.common_step == order.step


def test_two_workers_that_disagree_are_checked_by_others_and_whoever_disagrees_again_is_evicted() -> None:
    play = Checked()
    first = play.find(0)
    assert first.checker == "b"
    stories = play.stories()
    assert any(
        f"spot check of fragment 0 at step {first.through}: a's output (step {first.through}, micro-batch 0) as c got it "
        "differs from b's" in story
        for story in stories
    )
    assert any("a and b disagree in a spot check of fragment 0" in story for story in stories)
    assert play.metrics() == [], "no loss of those steps may be told"
    assert not play.sent(Shutdown)
    play.go_on()
    second = play.find(0)
    assert second.checker == "c", "another one than the first time"
    assert any("worker a is evicted: failed a spot check of fragment 0" in story for story in play.stories())
    assert set(play.sent(Shutdown)) == {"a"}
    assert (play.member("a").state, play.metrics(), play.job.restarts) == ("left", [], 2)
    play.go_on()
    assert set(play.plan.workers) == {"b", "c"}
    order = play.round()
    for check in play.orders():
        play.testify(check)
        play.rerun(check)
    assert play.metrics() == list(range(1, order.step + 1))


def test_a_checker_that_accuses_everybody_is_the_one_that_goes() -> None:
    """Workers a and b are checked by b and c; b says that a lies, and is itself found to lie by c."""
    play = Checked()
    play.round()
    for check in play.orders():
        lies = "b" in (check.checker, play.plan.placement[check.fragment])
        play.testify(check, got=FALSE if lies else TRUE)
        play.rerun(check)
    assert set(play.sent(Shutdown)) == {"b"}
    assert (play.job.checks_failed, play.job.accusations) == (2, [])


def test_between_two_workers_the_checkers_word_counts() -> None:
    play = Checked(workers="ab")
    play.round()
    check, _ = play.orders()
    for other in play.run.inspection.checks[1:] if play.run.inspection else ():
        other.void = "not asked"
    play.testify(check, state=FALSE)
    play.rerun(check)
    assert set(play.sent(Shutdown)) == {"a"}


def test_who_lies_is_told_from_pairs_that_are_at_odds() -> None:
    assert liar([], [("a", "b")], 3) is None
    assert liar([], [("a", "b")], 2) == "a"
    assert liar([("a", "b")], [("a", "b")], 3) == "a"
    assert liar([("a", "b")], [("a", "c")], 3) == "a"
    assert liar([("a", "b")], [("c", "b")], 3) == "b"
    assert liar([], [("a", "b"), ("c", "a")], 3) == "a"
    assert liar([], [("a", "b"), ("b", "c"), ("c", "a")], 3) == "a"
    assert impartial_first([("a", "b"), ("d", "a")], "a", ["b", "c", "d"]) == ["c", "b", "d"]


@pytest.mark.parametrize("same", ["name", "key"])
def test_an_evicted_worker_does_not_come_back(same: str) -> None:
    play = Checked(workers="ab")
    play.find(0)
    play.member("a").public_key = "a" * 40
    request = JoinRequest(
        name="a" if same == "name" else "z",
        protocol_version=1,
        fusion_version="",
        torch_version="",
        device=Device(),
        data_endpoint="tcp://127.0.0.1:1",
        public_key=("a" if same == "key" else "k") * 40,
    )
    with pytest.raises(NameTakenError, match="was evicted"):
        admit(play.lifecycle, request, play.now)


def test_a_check_that_cannot_be_made_is_void_and_holds_nobody_up() -> None:
    play = Checked(0.5, draws=[0.0, 0.9, 0.9])
    order = play.round()
    (check,) = play.orders()
    play.say(check.checker, _void(check))
    assert (play.counts(), play.run.common_step) == ((0, 0, 1), order.step)


def test_a_checker_that_says_nothing_is_not_waited_for_long() -> None:
    play = Checked()
    order = play.round()
    play.orders()
    play.tick(20.0)
    assert play.run.common_step == 0
    play.tick(20.0)
    assert (play.counts(), play.run.common_step) == ((0, 0, 3), order.step)


def test_a_worker_that_is_lost_meanwhile_makes_the_checks_void_and_is_replaced_as_ever() -> None:
    play = Checked()
    play.round()
    play.orders()
    play.vanish("c")
    play.all_adopted()
    assert "c" not in play.plan.workers
    assert play.counts() == (0, 0, 3)
    # Of a stretch in which fragments changed their host, not everything is logged any more.
    order = play.round()
    assert not play.orders()
    assert (play.counts(), play.run.common_step) == ((0, 0, 6), order.step)
    play.round()
    assert len(play.orders()) > 0


def test_a_restarted_coordinator_orders_the_round_and_its_checks_anew() -> None:
    play = Checked()
    play.round()
    for check in play.orders()[:2]:
        play.testify(check)
        play.rerun(check)
    play.restart_coordinator()
    assert (play.metrics(), play.run.common_step, play.counts()) == ([], 0, (0, 0, 3))
    order = play.round()
    for check in play.orders():
        play.testify(check)
        play.rerun(check)
    assert (play.run.common_step, play.counts()) == (order.step, (3, 0, 3))


@settings(max_examples=30, deadline=None)
@given(
    words=st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.integers(0, 2),
            st.sampled_from(["receipts", "replayed", "void"]),
            st.sampled_from([TRUE, FALSE]),
        ),
        max_size=24,
    )
)
def test_whatever_is_said_no_check_holds_a_job_up_and_no_step_is_told_twice(
    words: list[tuple[str, int, str, str]],
) -> None:
    play = Checked()
    order = play.round()
    checks = {check.fragment: check for check in play.orders()}
    for name, fragment, kind, digest in words:
        if play.state() != "running":
            break
        check = checks[fragment]
        value = told_value(order.step, digest)
        match kind:
            case "receipts":
                play.say(name, receipts(check, got=[value], used=[value], state=digest))
            case "replayed":
                play.say(name, replayed(check, [value], {order.step: digest}, {"a": [value]}))
            case _:
                play.say(name, _void(check))
    play.tick(60.0)
    if play.state() == "running":
        assert play.run.common_step == order.step
        assert play.metrics() == list(range(1, order.step + 1))
    else:
        assert (play.state(), play.metrics(), play.job.restarts) == ("preparing", [], 1)
        assert play.job.checks_failed > 0
    assert sum(play.counts()) == 3


def test_words_of_others_and_of_other_checks_count_for_nothing() -> None:
    play = Checked()
    play.round()
    check, *_ = play.orders()
    bystander = "a"
    assert bystander != check.checker
    play.say(bystander, replayed(check, [], {}))
    play.say(bystander, _void(check))
    play.say(check.checker, replayed(check.model_copy(update={"epoch": 7}), [], {}))
    play.say(check.checker, replayed(check.model_copy(update={"through": 1}), [], {}))
    play.say(check.checker, replayed(check.model_copy(update={"fragment": 9}), [], {}))
    assert play.run.inspection is not None
    assert play.run.inspection.checks[0].replayed is None


def test_the_last_steps_are_checked_before_the_job_is_done_and_its_checkpoint_is_written() -> None:
    play = Checked(steps=4)
    play.train(1, 4)
    digest = TRUE + TRUE
    for fragment, name in enumerate(play.plan.placement):
        blob = BlobRef(digest=digest, size=1)
        play.say(name, CheckpointPart(job="job", epoch=0, step=4, fragment=fragment, blob=blob))
    play.finish()
    checks = play.orders()
    assert [check.through for check in checks] == 3 * [4]
    assert (play.state(), play.metrics()) == ("running", [])
    for check in checks:
        assert not any(isinstance(each, ev.WriteCheckpoint) for each in play.out)
        play.testify(check, state="")
        play.rerun(check)
    assert play.metrics() == [1, 2, 3, 4]
    play.post(ev.CheckpointWritten(play.now, "job", 4, 1))
    assert play.state() == "done"


def test_a_false_part_of_the_last_checkpoint_is_found() -> None:
    play = Checked(steps=4)
    play.train(1, 4)
    for fragment, name in enumerate(play.plan.placement):
        blob = BlobRef(digest=(FALSE if fragment == 1 else TRUE) * 2, size=1)
        play.say(name, CheckpointPart(job="job", epoch=0, step=4, fragment=fragment, blob=blob))
    play.finish()
    for check in play.orders():
        play.testify(check, state="")
        play.rerun(check)
    assert any("b's part of the checkpoint differs from c's" in story for story in play.stories())
    assert play.state() == "preparing"
    assert not any(isinstance(each, ev.WriteCheckpoint) for each in play.out)


def test_between_unlike_machines_the_values_count_and_not_their_bits() -> None:
    play = Checked()
    play.member("b").device = Device(capability="AVX512")
    play.round()
    assert {check.fragment: check.exact for check in play.orders()} == {0: False, 1: False, 2: True}
    check = SpotCheck(fragment=0, host="a", checker="b", exact=False)
    order = Check(job="job", epoch=0, fragment=0, checker="b", after=0, through=2, exact=False)
    check.receipts = {"a": receipts(order), "b": receipts(order, state=FALSE)}
    for deviation, kind in ((TOLERANCE / 2, "passed"), (TOLERANCE * 2, "failed")):
        check.replayed = replayed(order, [], {2: TRUE}, deviation=deviation)
        assert judge(check, {}, {}).kind == kind


def test_prepared_workers_keep_receipts_only_for_jobs_with_checks() -> None:
    assert Prepare.model_fields["verify"].default is False


@settings(max_examples=60, deadline=None)
@given(
    values=st.dictionaries(
        st.tuples(
            st.sampled_from(["ACTIVATION", "GRADIENT", "NORMS"]), st.integers(0, 3), st.integers(1, 4), st.just(0)
        ),
        st.sampled_from([TRUE, FALSE]),
        min_size=1,
    ),
    lies=st.sets(st.integers(0, 20), max_size=3),
    lost=st.sets(st.integers(0, 20), max_size=3),
)
def test_a_check_fails_at_the_first_value_that_differs_whatever_is_missing(
    values: dict[tuple[str, int, int, int], str], lies: set[int], lost: set[int]
) -> None:
    order = Check(job="job", epoch=0, fragment=0, checker="b", after=0, through=4)
    keys = sorted(values)
    told = {key: values[key] for index, key in enumerate(keys) if index not in lost}
    false = {key: (FALSE if told[key] == TRUE else TRUE) for i, key in enumerate(keys) if i in lies and key in told}
    check = SpotCheck(fragment=0, host="a", checker="b", exact=True)
    check.receipts = {
        "a": receipts(order),
        "b": receipts(order),
        "c": receipts(order, got=[(*key, digest) for key, digest in (told | false).items()]),  # type: ignore[misc]
    }
    check.replayed = replayed(order, [(*key, digest) for key, digest in values.items()], {})  # type: ignore[misc]
    verdict = judge(check, {}, {})
    assert verdict.kind == ("failed" if false else "passed")
    if false:
        assert (verdict.step, verdict.blamed) == (min(key[2] for key in false), ("a",))


def test_where_host_and_checker_were_given_different_things_one_of_the_two_sides_lies() -> None:
    order = Check(job="job", epoch=0, fragment=1, checker="c", after=0, through=4)
    check = SpotCheck(fragment=1, host="b", checker="c", exact=True)
    check.receipts = {"b": receipts(order, used=[told_value(3, TRUE, edge=0)])}
    check.replayed = replayed(order, [], {}, used={"a": [told_value(3, FALSE, edge=0)]})
    verdict = judge(check, {}, {})
    assert (verdict.kind, verdict.step, verdict.blamed) == ("failed", 3, ("a", "b"))


@pytest.mark.parametrize("exact", [True, False])
def test_a_loss_that_is_no_number_is_true_only_where_the_checker_finds_it_too(exact: bool) -> None:
    order = Check(job="job", epoch=0, fragment=1, checker="c", after=0, through=4)
    check = SpotCheck(fragment=1, host="b", checker="c", exact=exact)
    for found in (1.5, math.nan, math.inf, -math.inf):
        check.replayed = replayed(order, [], {}).model_copy(update={"losses": {2: found}})
        for told in (1.5, math.nan, math.inf, -math.inf):
            assert judge(check, {}, {2: told}).kind == ("passed" if str(found) == str(told) else "failed")


def test_a_false_loss_is_found() -> None:
    order = Check(job="job", epoch=0, fragment=1, checker="c", after=0, through=4)
    check = SpotCheck(fragment=1, host="b", checker="c", exact=True)
    check.replayed = replayed(order, [], {}).model_copy(update={"losses": {2: 1.5, 3: 1.25}})
    assert judge(check, {}, {2: 1.5, 3: 1.25}).kind == "passed"
    verdict = judge(check, {}, {2: 1.5, 3: 1.0})
    assert (verdict.kind, verdict.step, verdict.blamed) == ("failed", 3, ("b",))


def _void(check: Check) -> CheckVoid:
    return CheckVoid(job="job", epoch=check.epoch, fragment=check.fragment, through=check.through, message="no room")
