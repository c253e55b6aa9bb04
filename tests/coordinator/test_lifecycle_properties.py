"""A thousand little disasters: random events go into the life cycle, and its promises must hold after each."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

from coordinator_cases import job_record, job_spec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule
from played_workers import Network, PlayedWorker

from coordinator.life import events as ev
from coordinator.life.books import Timing
from coordinator.life.jobs import Job
from coordinator.life.lifecycle import Lifecycle
from coordinator.life.membership import all_finished
from coordinator.life.pool import Member
from fusion.messages import (
    BackupFailed,
    Commit,
    Device,
    Failure,
    Heartbeat,
    Leaving,
    PeerLost,
    Prepare,
    Resume,
    Shutdown,
    Start,
    Stop,
    ToCoordinator,
)
from fusion.plan import Plan

NAMES = ("a", "b", "c", "d")
TIMING = Timing(failure_timeout=5.0, drain_patience=20.0)


class PoolMachine(RuleBasedStateMachine):
    """Plays the workers, the scheduler and the clock around a `Lifecycle`."""

    incarnations: Bundle[str] = Bundle("incarnations")
    jobs: Bundle[str] = Bundle("jobs")

    @initialize(target=jobs)
    def begin(self) -> str:
        self.now = 1000.0
        self.number = 0
        self.born = 0
        self.lifecycle = Lifecycle(TIMING)
        self.metrics: dict[str, list[int]] = defaultdict(list)
        self.ended: dict[str, str] = {}
        self.told: dict[str, dict[str, int]] = defaultdict(dict)
        """Incarnation -> job -> epoch, of what it was asked to prepare and not told to forget."""
        self.network = Network()
        self.workers: dict[str, PlayedWorker] = {}
        self.plans: list[ev.MakePlan] = []
        """Asked of the scheduler and not answered yet."""
        self.writes: list[ev.WriteCheckpoint] = []
        for name in NAMES[:3]:
            self.join(name)
        self.everybody_beats()
        job = self.submitted(None, None)
        self.all_work(6, None, True)
        return job

    # What comes out ---------------------------------------------------------------------------------------------

    def post(self, event: ev.Event) -> None:
        self.carry_out(self.lifecycle.handle(event))

    def carry_out(self, instructions: list[ev.Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case ev.MakePlan():
                    self.plans.append(instruction)
                case ev.WriteCheckpoint(job, step):
                    assert all((job, step) != (other.job, other.step) for other in self.writes), "written twice at once"
                    self.writes.append(instruction)
                case ev.PrepareWorkers():
                    for incarnation in instruction.hosts:
                        self.told[incarnation][instruction.job] = instruction.epoch
                        self.workers[incarnation].inbox.append(self.prepare_of(instruction))
                case ev.Send(incarnation, Stop(job=job)):
                    self.told[incarnation].pop(job, None)
                case ev.Send(incarnation, Shutdown()):
                    self.told[incarnation].clear()
                case ev.Send(incarnation, Start(job=job, epoch=epoch)):
                    assert self.told[incarnation].get(job) == epoch, "started without being prepared"
                case ev.Send(incarnation, Commit(job=job, step=step)):
                    self.check_commit(job, step)
                case ev.RecordMetric(job, metric):
                    self.metrics[job].append(metric.step)
                case _:
                    pass
            if isinstance(instruction, ev.Send) and instruction.incarnation in self.workers:
                self.workers[instruction.incarnation].inbox.append(instruction.message)

    def prepare_of(self, asked: ev.PrepareWorkers) -> Prepare:
        job = self.lifecycle.jobs[asked.job]
        assert job.run is not None
        self.network.runs[job.id, asked.epoch] = job.run.epoch
        resume = Resume(step=asked.checkpoint) if asked.checkpoint is not None else None
        return Prepare(
            job=job.id,
            plan=asked.plan,
            dag=job.dag,
            weights=job.weights,
            data=job.data,
            train=job.train,
            peers=list(asked.peers),
            resume=resume,
            backups=asked.backups,
        )

    def check_commit(self, name: str, step: int) -> None:
        """What is forgotten now was held, and everybody is through with it."""
        job = self.lifecycle.jobs[name]
        assert job.run is not None
        assert job.plan is not None
        for fragment in range(len(job.plan.placement)):
            assert self.network.furthest.get((name, job.run.epoch, fragment), 0) >= step
        for fragment, holder in job.run.holders.items():
            worker = self.workers[job.hosts[holder]]
            assert worker.job is not None
            assert step in worker.job.held.get(fragment, set()), f"{holder} does not hold fragment {fragment}"

    # What goes in -----------------------------------------------------------------------------------------------

    @rule(target=incarnations, name=st.sampled_from(NAMES))
    def join(self, name: str) -> str:
        self.born += 1
        member = Member(
            name=name,
            incarnation=f"{name}{self.born}",
            device=Device(),
            endpoint="tcp://x:1",
            public_key=f"{self.born}",
        )
        self.workers[member.incarnation] = PlayedWorker(name, self.network)
        self.post(ev.WorkerJoined(self.now, member))
        return member.incarnation

    def say_all(self, incarnation: str, messages: list[ToCoordinator]) -> None:
        for message in messages:
            self.say(incarnation, message)

    def say(self, incarnation: str, message: ToCoordinator) -> None:
        self.post(ev.Reported(self.now, incarnation, message))

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 4.0]))
    def time_passes(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            self.post(ev.ClockTicked(self.now))

    @rule()
    def everybody_beats(self) -> None:
        for member in self.lifecycle.pool.live():
            self.say(member.incarnation, Heartbeat(incarnation=member.incarnation))

    @rule(target=jobs, workers=st.sampled_from([None, 1, 2, 3]), every=st.sampled_from([None, 2]))
    def submit(self, workers: int | None, every: int | None) -> str:
        return self.submitted(workers, every)

    def submitted(self, workers: int | None, every: int | None) -> str:
        self.number += 1
        job = f"job-{self.number}"
        spec = job_spec(
            train={"steps": 30, "global_batch": 1, "micro_batch": 1},
            plan={"workers": workers},
            checkpoint={"every": every},
            fault_tolerance={"failure_timeout": 5.0, "backup_every": 3},
        )
        record = job_record(spec, id=job, number=self.number, submitted_at=self.now)
        self.post(ev.JobSubmitted(self.now, record))
        return job

    @rule(job=jobs)
    def cancel(self, job: str) -> None:
        self.post(ev.CancelRequested(self.now, job))

    @precondition(lambda self: self.plans)
    @rule(index=st.integers(0, 7), extra=st.integers(0, 2))
    def plan_made(self, index: int, extra: int) -> None:
        asked = self.plans.pop(index % len(self.plans))
        workers = asked.workers[: max(1, len(asked.workers) - extra)]
        if asked.previous is not None:
            cuts = asked.previous.cuts
        elif (wanted := self.lifecycle.jobs[asked.job].spec.plan.workers) is not None:
            workers = (asked.workers[extra:] or asked.workers)[-wanted:]
            cuts = tuple(range(1, len(workers)))
        else:
            cuts = tuple(range(1, len(workers)))
        placement = tuple(workers[index * len(workers) // (len(cuts) + 1)] for index in range(len(cuts) + 1))
        plan = Plan(policy="x", cuts=cuts, placement=placement, in_flight=(1,) * len(placement))
        if asked.price:
            plan = plan.model_copy(update={"predicted_step_seconds": 0.5})
        self.post(ev.PlanMade(self.now, asked.job, asked.attempt, plan, (), 1.0))

    @precondition(lambda self: self.plans)
    @rule(index=st.integers(0, 7), final=st.booleans())
    def plan_refused(self, index: int, final: bool) -> None:
        asked = self.plans.pop(index % len(self.plans))
        self.post(ev.PlanRefused(self.now, asked.job, asked.attempt, "too small", final))

    @rule(incarnation=incarnations)
    def one_works(self, incarnation: str) -> None:
        """A worker hears what it was told and goes a step on, when it comes to it."""
        worker = self.workers[incarnation]
        self.say_all(incarnation, worker.hear())
        if (member := self.lifecycle.pool.of_incarnation(incarnation)) is not None and member.live:
            self.say_all(incarnation, worker.step())
            self.say_all(incarnation, worker.finish())

    @rule(rounds=st.integers(1, 6), slow=st.sampled_from([None, *NAMES]), snapshots=st.booleans())
    def all_work(self, rounds: int, slow: str | None, snapshots: bool) -> None:
        """Everybody gets on for a while, perhaps but for one."""
        for _ in range(rounds):
            while self.plans:
                self.plan_made(0, 0)
            self.now += 0.1
            self.post(ev.ClockTicked(self.now))
            for incarnation, worker in list(self.workers.items()):
                if worker.name != slow:
                    self.one_works(incarnation)
            while snapshots and self.network.snapshots:
                self.snapshot_arrives(0, "whole")

    @precondition(lambda self: self.network.snapshots)
    @rule(index=st.integers(0, 7), outcome=st.sampled_from(["whole", "whole", "whole", "corrupt", "memory", "lost"]))
    def snapshot_arrives(self, index: int, outcome: str) -> None:
        order, fragment, holder = self.network.snapshots.pop(index % len(self.network.snapshots))
        for incarnation, worker in self.workers.items():
            if worker.name != holder:
                continue
            if outcome == "whole":
                self.say_all(incarnation, worker.hold(order, fragment))
            elif outcome != "lost":
                said = {"job": order.job, "epoch": order.epoch, "step": order.step, "fragment": fragment}
                self.say(incarnation, BackupFailed.model_validate({**said, "cause": outcome}))

    @precondition(lambda self: self.writes)
    @rule(well=st.booleans())
    def checkpoint_over(self, well: bool) -> None:
        written = self.writes.pop(0)
        event: ev.Event
        if well:
            event = ev.CheckpointWritten(self.now, written.job, written.step, 10)
        else:
            event = ev.CheckpointFailed(self.now, written.job, written.step, "disk full")
        self.post(event)

    @rule(
        incarnation=incarnations,
        kind=st.sampled_from(["dies", "dies", "hangs", "leaves", "leaves", "fails", "is cut off"]),
    )
    def disaster(self, incarnation: str, kind: str) -> None:
        member = self.lifecycle.pool.of_incarnation(incarnation)
        match kind:
            case "dies":
                for other in self.told:
                    for job in list(self.told[other]):
                        self.say(other, PeerLost(job=job, peer=incarnation.rstrip("0123456789")))
                self.post(ev.WorkerUnreachable(self.now, incarnation))
            case "hangs" if member is not None and member.live:
                member.last_heard = self.now - 6
                self.post(ev.ClockTicked(self.now))
            case "leaves":
                self.say(incarnation, Leaving(reason="SIGTERM"))
            case "fails":
                for job, epoch in list(self.told[incarnation].items()):
                    self.say(incarnation, Failure(job=job, epoch=epoch, message="broken"))
            case "is cut off":
                self.workers[incarnation].inbox.clear()
            case _:
                pass

    @rule()
    def coordinator_restarts(self) -> None:
        before = self.lifecycle
        jobs = [Job.model_validate_json(job.model_dump_json()) for job in before.jobs.values()]
        members = [Member.model_validate_json(member.model_dump_json()) for member in before.pool]
        self.lifecycle = Lifecycle(TIMING)
        self.writes = []  # Lost with the process; what is still needed is asked for again.
        self.carry_out(self.lifecycle.restore(jobs, members, self.now))

    # What must hold ---------------------------------------------------------------------------------------------

    @invariant()
    def a_worker_hosts_at_most_one_job(self) -> None:
        holder: dict[str, str] = {}
        for job in self.lifecycle.jobs.values():
            for incarnation in job.hosts.values():
                assert incarnation not in holder, f"{incarnation} hosts {holder[incarnation]} and {job.id}"
                holder[incarnation] = job.id
        for member in self.lifecycle.pool.live():
            if member.state in ("joined", "idle"):
                assert member.job is None
                assert member.incarnation not in holder
            else:
                assert member.job is not None
                assert holder.get(member.incarnation) == member.job
            assert len(self.told[member.incarnation]) <= 1

    @invariant()
    def an_active_job_has_live_workers_only(self) -> None:
        live = {member.incarnation for member in self.lifecycle.pool.live()}
        for job in self.lifecycle.jobs.values():
            if job.state in ("preparing", "running") and not all_finished(job):
                assert job.hosts
                assert set(job.hosts.values()) <= live
            if job.state not in ("preparing", "running"):
                assert not job.hosts

    @invariant()
    def terminal_states_are_final(self) -> None:
        for job in self.lifecycle.jobs.values():
            if job.id in self.ended:
                assert job.state == self.ended[job.id]
            elif job.terminal:
                self.ended[job.id] = job.state

    @invariant()
    def each_step_is_reported_once_in_order(self) -> None:
        for steps in self.metrics.values():
            assert all(left < right for left, right in pairwise(steps))

    @invariant()
    def nobody_starves_while_workers_are_free(self) -> None:
        idle = self.lifecycle.pool.idle()
        if not idle:
            return
        queued = sorted(
            (job for job in self.lifecycle.jobs.values() if job.state == "queued"),
            key=lambda job: (job.plan is None, job.number),
        )
        usable = [member for member in self.lifecycle.pool.live() if member.state in ("idle", "busy")]
        for job in queued:
            needed = 1 if job.plan is not None else job.spec.plan.workers or 1
            if job.refused_for is not None:
                if {member.incarnation for member in usable} - set(job.refused_for):
                    return  # It may wait for other workers, and those behind it with it.
                continue
            if needed > len(usable):
                continue
            assert needed > len(idle), f"{job.id} could start on {len(idle)} idle workers"
            return

    @invariant()
    def a_fragment_has_one_host_in_an_epoch(self) -> None:
        hosts: dict[tuple[str, int, int], str] = {}
        for incarnation, worker in self.workers.items():
            if worker.job is None:
                continue
            for fragment in worker.job.plan.fragments_of(worker.name):
                key = (worker.job.prepare.job, worker.job.plan.epoch, fragment)
                assert hosts.setdefault(key, incarnation) == incarnation

    @invariant()
    def who_waits_knows_why(self) -> None:
        for job in self.lifecycle.jobs.values():
            if job.state in ("queued", "failed", "cancelled"):
                assert job.reason


TestLifecycle = PoolMachine.TestCase
TestLifecycle.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
