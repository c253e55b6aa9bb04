"""Trains a GPT with dropout while its pool is torn apart, and compares every bit with the undisturbed run.

`python benchmarks/chaos.py --faults 200 --steps 1000`. Faults of every kind come at random, by a seed: `kill -9` at an exact
point (in forward, backward, update, between update and report, with a snapshot under way, while it replays or pauses), two
at once, a worker with its backup, all but one, all; stalls shorter and longer than `failure_timeout`; broken connections; drain
and SIGTERM; the coordinator killed and started again. What has died comes back. Prints a table and writes JSON; the exit code
is 0 only when losses and weights are bit-identical, each step was published once, and no process, file descriptor or memory leaks.

Goodput is the time that the undisturbed run takes over the time of this one.

`--job` trains something else: with lossy codecs that keep what they lost (`feedback`, `rounded`), a ResNet with batch norm
(`resnet`), with activations computed again (`recompute`), with spot checks (`verified`), with logs that are full after a few
steps (`full-logs`).
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ONE_THREAD, Workload, machine, report, write_text

os.environ.update(ONE_THREAD)

import psutil

from benchmarks.disturbed import FaultyPool, Outcome, Running, differences, joined
from benchmarks.slow_jobs import data_of, job_spec
from fusion.errors import FusionError
from fusion.submit import CapturedJob, capture_job, read_job

POINTS = ("forward", "backward", "update", "report", "snapshot", "replay", "pause")
TIMEOUT = 1.5
"""The job's failure_timeout in seconds: short, so that stalled workers are given up soon."""
_PATIENCE = 3600.0
"""Seconds for a whole run: this program is for any machine."""


class Storm:
    """Makes things happen to a pool. Each kind is a method; none returns before it has happened."""

    def __init__(self, pool: FaultyPool, run: Running, names: tuple[str, ...], seed: int) -> None:
        self.pool = pool
        self.run = run
        self.names = names
        self.random = random.Random(seed)
        self.happened: Counter[str] = Counter()
        self.kinds: dict[str, Callable[[], bool]] = {
            **{f"dies at {point}": partial(self.die_at, point) for point in POINTS},
            "two at once": self.two,
            "worker and backup": self.with_backup,
            "all but one": lambda: self.kill(*self.random.sample(self.living(), max(0, len(self.living()) - 1))),
            "all": lambda: self.kill(*self.living()),
            "short stall": lambda: self.stall(0.3 * TIMEOUT),
            "long stall": self.long_stall,
            "connections cut": lambda: self.die_at("cut"),
            "drain": lambda: self.leave(self.drain),
            "sigterm": lambda: self.leave(self.terminate),
            "coordinator dies": self.coordinator,
        }
        # What sends the job back to a checkpoint costs much more than what is adopted: it is rarer here as well.
        rare = {"all": 1, "worker and backup": 2, "all but one": 2}
        self.weights = [rare.get(kind, 4) for kind in self.kinds]

    def living(self) -> list[str]:
        return [name for name in self.names if self.pool.alive(name)]

    def strike(self) -> str:
        """One fault of a random kind; tries others when that one can't happen now."""
        while True:
            kind = self.random.choices(list(self.kinds), self.weights)[0]
            if self.run.ended is not None:
                return ""
            try:
                if self.kinds[kind]():
                    self.happened[kind] += 1
                    return kind
            except FusionError:
                continue  # the coordinator was asked in the middle of something

    def outlive(self, step: int) -> None:
        """Until this step is done, or nobody is left to do it."""
        self.run.until(lambda: self.run.ended is not None or self.run.step >= step or not self.living(), 300)

    def heal(self, enough: int = 2) -> None:
        """What has died is started again; waits until so many are back that the next fault hits somebody."""
        for name in self.names:
            self.pool.forgive(name)
            if not self.pool.alive(name):
                self.pool.start_again(name)
        self.run.until(lambda: self.run.ended is not None or len(joined(self.pool, self.names)) >= enough)

    # Kinds ---------------------------------------------------------------------------------------------------------

    def kill(self, *victims: str) -> bool:
        for name in victims:
            self.pool.kill(name)
        return bool(victims)

    def members(self) -> list[str]:
        """Those that live, are through with starting, and will not die of a fault that is still to come."""
        members = joined(self.pool, self.names)
        return sorted(name for name in members if self.pool.alive(name) and not self.pool.pending(name))

    def hosts(self) -> list[str]:
        return [name for name in dict.fromkeys(self.run.plan()) if self.pool.alive(name)]

    def die_at(self, point: str) -> bool:
        """Some points are reached only after something else happened: then it comes later, or is taken back."""
        hosts = self.hosts()
        if not hosts:
            return False
        victim = self.random.choice(hosts)
        if point == "replay" and len(hosts) > 1:
            heirs = [name for name in self.run.backups().values() if name != victim]
            if not heirs:
                return False
            self.pool.fail_at(self.random.choice(heirs), "replay")
            return self.kill(victim)
        if point == "pause":
            others = [name for name in hosts if name != victim]
            if not others or victim not in self.members():
                return False
            self.pool.fail_at(self.random.choice(others), "pause")
            self.drain(victim)
            self.gone(victim)
            return True
        self.pool.fail_at(victim, point)
        at = self.run.step
        self.run.until(lambda: not self.pool.pending(victim) or self.run.step > at + 10 or self.run.ended is not None)
        if self.pool.pending(victim):
            self.pool.forgive(victim)
            return False
        return True

    def two(self) -> bool:
        hosts = self.hosts()
        return len(hosts) > 2 and self.kill(*self.random.sample(hosts, 2))

    def with_backup(self) -> bool:
        placement, backups = self.run.plan(), self.run.backups()
        if not placement or not backups:
            return False
        fragment = self.random.choice(list(backups))
        victims = {placement[fragment], backups[fragment]}
        return all(map(self.pool.alive, victims)) and self.kill(*victims)

    def stall(self, seconds: float) -> bool:
        hosts = self.hosts()
        if not hosts:
            return False
        victim = self.random.choice(hosts)
        self.pool.stall(victim)
        time.sleep(seconds)
        self.pool.wake(victim)
        return True

    def long_stall(self) -> bool:
        # One that has joined: a process that is stopped while it starts is missed by nobody.
        members = [name for name in self.hosts() if name in self.members()]
        if len(members) < 2:
            return False
        victim = self.random.choice(members)
        self.pool.stall(victim)
        try:
            self.run.until(lambda: self.missed(victim) or self.run.ended is not None)
        finally:
            self.pool.wake(victim)
        return True

    def missed(self, victim: str) -> bool:
        """Whether the pool has given it up; not known while the coordinator does not answer."""
        there = joined(self.pool, self.names)
        return bool(there) and victim not in there

    def leave(self, ask: Callable[[str], None]) -> bool:
        """One of two or more is asked to leave in good order."""
        living = self.members()
        if len(living) < 2:
            return False
        victim = self.random.choice(living)
        # A death that still waits for its point would come in the middle of the good order.
        self.pool.forgive(victim)
        if not self.pool.alive(victim):
            return False
        ask(victim)
        code = self.gone(victim)
        assert code == 0, f"{victim} was asked by {ask.__name__} and ended with {code}\n{self.pool.last_words(victim)}"
        return True

    def gone(self, victim: str) -> int:
        """Wait for the end of one that leaves by itself; returns its exit code."""
        self.run.until(lambda: not self.pool.alive(victim))
        return self.pool.forget(victim)

    def drain(self, victim: str) -> None:
        with self.pool.client() as client:
            client.drain(victim)

    def terminate(self, victim: str) -> None:
        self.pool.signal(victim, signal.SIGTERM)

    def coordinator(self) -> bool:
        self.pool.kill("coordinator")
        self.pool.start_coordinator()
        return True


def usage(pool: FaultyPool) -> dict[str, tuple[int, int]]:
    """Process -> (file descriptors, resident bytes)."""
    found = {}
    for name, pid in pool.process_ids().items():
        process = psutil.Process(pid)
        found[name] = (process.num_fds(), process.memory_info().rss)
    return found


def calm(job: CapturedJob, names: tuple[str, ...], folder: Path) -> tuple[Outcome, dict[str, tuple[int, int]]]:
    with FaultyPool(folder, names) as pool:
        pool.wait_for_workers()
        outcome = Running(pool, job).finish(_PATIENCE)
        return outcome, usage(pool)


def disturbed(
    job: CapturedJob, names: tuple[str, ...], folder: Path, faults: int, seed: int, say: Callable[[str], None]
) -> tuple[Outcome, Storm, dict[str, tuple[int, int]]]:
    """Train the job through so many faults, spread over its steps. Raises `AssertionError` when something is not as it must be."""
    steps = job.spec.train.steps
    with FaultyPool(folder, names) as pool:
        pool.wait_for_workers()
        run = Running(pool, job)
        storm = Storm(pool, run, names, seed)
        run.until_step(2)
        # Not in the last steps: the job must still be there for the fault.
        due = [2 + (steps - max(12, steps // 25)) * index // faults for index in range(faults + 1)]
        for index in range(faults):
            run.until_step(due[index], 300)
            kind = storm.strike()
            if not kind:
                break  # The last fault took so long to come that the job is done.
            say(f"fault {index + 1}/{faults} at step {run.step}: {kind}")
            if storm.random.random() < 0.6:
                storm.outlive(run.step + 1)
            # Where faults lag behind the steps, the next one comes before others are back.
            late = run.step >= due[index + 1]
            storm.heal(enough=1 if late else 2)
            run.until(lambda: run.ended is not None or storm.hosts())
        outcome = run.finish(_PATIENCE)
        storm.heal()  # A fault may have come to its point just after the last healing.
        run.until(lambda: len(joined(pool, names)) == len(names))
        return outcome, storm, usage(pool)


def leaks(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> list[str]:
    """Processes that ended the disturbed run with much more than those of the calm one."""
    found = []
    for name, (files, memory) in after.items():
        usual_files, usual_memory = before[name]
        if files > usual_files + 20:
            found.append(f"{name}: {files} file descriptors, {usual_files} without faults")
        if memory > 1.5 * usual_memory + 64 * 2**20:
            found.append(f"{name}: {memory >> 20} MiB, {usual_memory >> 20} without faults")
    return found


_FIXED = {"policy": "equal-compute", "fragments": 4}
"""Cuts that no measurement moves, where bits depend on them."""
JOBS: dict[str, dict[str, dict[str, object]]] = {
    "plain": {},
    "feedback": {"compression": {"codec": "topk", "ratio": 10, "error_feedback": True}, "plan": _FIXED},
    "rounded": {
        "compression": {
            "codec": "int4",
            "forward": "int4:stochastic=1",
            "backward": "int3:stochastic=1",
            "error_feedback": True,
        },
        "plan": _FIXED,
    },
    "resnet": {"plan": _FIXED},
    "recompute": {"train": {"recompute": True}, "plan": {**_FIXED, "schedule": "gpipe"}},
    "verified": {"verify": {"fraction": 0.2}},
    "full-logs": {"fault_tolerance": {"log_memory": "6MiB"}},
}
"""What differs from the plain job, by section."""
LONG = Workload(layers=4, width=128, sequence_length=128, micro_batch=2, micro_batches=8)
"""A step takes long enough for a worker to be started again within some ten of them."""


def captured(workload: Workload, folder: Path, job: str = "plain") -> CapturedJob:
    """One of `JOBS`; of the ResNet, the workload says only how many steps."""
    if job == "resnet":
        spec = job_spec("resnet", data_of("resnet", folder), workload.steps)
    else:
        spec = workload.job(write_text(folder))
        spec["model"] = {**spec["model"], "args": {**workload.model_args, "dropout": 0.1}}  # type: ignore[dict-item]
    spec["name"] = "chaos"
    spec["train"] = {**spec["train"], "clip_grad_norm": 1.0, "eval_every": 25}  # type: ignore[dict-item]
    spec["checkpoint"] = {"every": 25}
    spec["fault_tolerance"] = {"failure_timeout": TIMEOUT}
    for section, changes in JOBS[job].items():
        spec[section] = {**spec.get(section, {}), **changes}  # type: ignore[dict-item]
    return capture_job(*read_job(spec))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--job", choices=JOBS, default="plain", help="what is trained")
    options = parser.parse_args()
    names = tuple(f"worker-{index + 1}" for index in range(options.workers))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        job = captured(replace(LONG, steps=options.steps), folder, options.job)
        before, usual = calm(job, names, folder / "calm")
        outcome, storm, after = disturbed(
            job, names, folder / "storm", options.faults, options.seed, partial(print, flush=True)
        )
    wrong = differences(before, outcome) + leaks(usual, after)
    own = psutil.Process()
    wrong += [f"process {child.pid} was left behind" for child in own.children(recursive=True)]
    goodput = sum(before.step_seconds.values()) / outcome.seconds
    rows = [[kind, str(count)] for kind, count in sorted(storm.happened.items())]
    rows += [
        ["adoptions", str(outcome.count("adoption"))],
        ["restarts from a checkpoint", str(outcome.count("restarted"))],
        ["moves", str(outcome.count("moved"))],
        ["steps lost or published twice", str(options.steps - len(outcome.losses) + len(outcome.repeated))],
        ["differences", str(len(wrong))],
        ["goodput", f"{goodput:.0%} of {outcome.seconds:.0f} s"],
    ]
    report(
        "chaos" if options.job == "plain" else f"chaos_{options.job}",
        f"{options.job} job, {options.steps} steps through {storm.happened.total()} of {options.faults} faults, "
        f"seed {options.seed}",
        ["what", "times"],
        rows,
        {
            "machine": machine(),
            "faults": dict(storm.happened),
            "adoptions": outcome.count("adoption"),
            "restarts": outcome.count("restarted"),
            "moves": outcome.count("moved"),
            "goodput": goodput,
            "seconds": outcome.seconds,
            "wrong": wrong,
            "job": options.job,
            "seed": options.seed,
            "steps": options.steps,
        },
    )
    if wrong:
        print(*(event["message"] for event in outcome.events), sep="\n", file=sys.stderr)
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
