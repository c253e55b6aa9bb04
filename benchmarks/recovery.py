"""What the loss of a worker costs: from `kill -9` to the next completed step, on loopback and on links of 100 and 20 Mbit/s.

`python benchmarks/recovery.py`, as root for the shaped links (`shaping.py`). A GPT is trained on four workers; one of them is
killed at a random moment, the first, the last, the busiest and those in the middle in turn, each in a job of its own. Beside
what the product does (the backup worker adopts and replays) stand

- *restart*: back to the last checkpoint, which is what the product does where nobody holds a snapshot: here the adopter is
  made to refuse;
- *heavy rescheduling*, Asteroid's baseline: the state of all fragments goes to the coordinator, a plan is made, all state goes out
  again. The product does not do that at a loss, so it is put together from what the product does do and this program
  measures: noticing the loss, collecting all state (the checkpoint at the end of an undisturbed job, when nothing else is on the links),
  and from the loss to the start of a restart (stopping, planning, building, fetching all state), plus one median step.
  Nothing runs again. It flatters the baseline: the dead worker's state would have to come from somewhere, and the plan keeps
  the cuts;
- with `--torchft PYTHON` (an interpreter that has torch and torchft) what torchft does with as many replicas of the same model
  (`torchft_replicas.py`), on loopback. That is another kind of parallelism: every replica has all state, and the gradients of
  the step that is lost are gone.

The next completed step is the first one that the killed worker had not reported. *In place* is when every fragment has a host
with its state again, before anything is trained: for adoption the begin of its replay, for heavy rescheduling all but the
step. Losses and final weights are compared with an undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import shaping
from benchmarks.common import ONE_THREAD, ROOT, Disturbance, Sample, Workload, child_environment, machine, report
from benchmarks.common import write_text as write_training_text
from benchmarks.disturbed import Outcome, Running, differences, joined
from benchmarks.placed_pool import PlacedPool
from benchmarks.placed_worker import REFUSE
from benchmarks.shaped_pool import shaped_pool
from benchmarks.slow_jobs import YARDSTICK
from fusion.client import StreamItem
from fusion.local import LocalPool, LocalWorker
from fusion.submit import CapturedJob, capture_job, read_job

WORKERS = tuple(f"worker-{index}" for index in range(4))
CHECKPOINT_EVERY = 20
FAILURE_TIMEOUT = 5.0
SETTLED = 20
"""The step after which workers are killed at the earliest."""
LEFT = 25
"""Steps of a job after that."""
UNDISTURBED = 3
"""Runs that say what collecting all state takes: after a loss it is elsewhere."""
POLICY, FIXED = "op-fence", "equal-ops"
"""The default; and with lossy codecs one whose cuts, which decide what is rounded, do not depend on what was measured."""
VICTIMS = ("first", "last", "busiest", "second", "third")


@dataclass(frozen=True)
class Setting:
    name: str
    bits_per_second: float | None
    """None: loopback, which is not shaped."""


SETTINGS = (Setting("loopback", None), Setting("100 Mbit/s", 100e6), Setting("20 Mbit/s", 20e6))


@dataclass(frozen=True)
class Loss:
    """One kill and what came of it; durations in seconds."""

    victim: str
    step: int
    median_step: float
    """Before the kill."""
    noticed: float
    """Until people were told."""
    next_step: float
    """Until the next completed step."""
    replayed_steps: int | None
    in_place: float | None
    """Until the adopter had the lost state and began to replay."""
    started: float | None
    """Until a restart had everybody ready."""
    different: tuple[str, ...]
    """What is not as in the undisturbed run."""

    @property
    def after_notice(self) -> float:
        return self.next_step - self.noticed


class Timed(Running):
    """A job under way, with the time at which each event was heard of."""

    def __init__(self, pool: LocalPool, job: CapturedJob) -> None:
        self.told_at: list[tuple[str, float, dict[str, Any]]] = []
        super().__init__(pool, job)

    def _take(self, item: StreamItem) -> None:
        if item.kind == "event":
            self.told_at.append((str(item.data["event"]), time.monotonic(), item.data))
        super()._take(item)

    def first(self, event: str, after: float = 0.0) -> float | None:
        """When this was told first, after `after`."""
        return next((at for told, at, _ in self.told_at if told == event and at >= after), None)

    def replay(self) -> tuple[int, float] | None:
        """The steps that were replayed first, and when that began."""
        found = (
            (int(data["steps"]), at - float(data["seconds"])) for told, at, data in self.told_at if told == "replayed"
        )
        return next(found, None)


def collecting(run: Timed, outcome: Outcome) -> float | None:
    """Seconds from the last step until all state was at the coordinator and written: nothing else is on the links then."""
    last = max(outcome.losses)
    for told, at, data in run.told_at:
        if told == "checkpoint" and data["step"] == last:
            return at - run.arrived[last]
    return None


def choose(pool: PlacedPool, run: Timed, victim: str) -> str:
    """The worker that `victim` names, which depends on the plan; one that has no state to lose is none."""
    with pool.client() as client:
        fragments = [fragment for fragment in client.job(run.id)["fragments"] if fragment["parameter_bytes"]]
    if victim == "busiest":
        return str(max(fragments, key=lambda fragment: fragment["flops"])["worker"])
    at = {"first": 0, "second": 1, "third": 2, "last": -1}[victim]
    return str(fragments[min(at, len(fragments) - 1)]["worker"])


def lose(
    pool: PlacedPool, job: CapturedJob, victim: str, chance: random.Random, undisturbed: Outcome, *, restart: bool
) -> Loss:
    """Train the job, kill a worker on the way; returns what it cost.

    Not before the step that leaves `LEFT` of them, and once a snapshot is held.
    """
    pool.switch(REFUSE, restart)
    run = Timed(pool, job)
    run.until_step(job.spec.train.steps - LEFT)
    run.until(run.common_step)
    run.until_step(run.step + chance.randrange(10))
    before = [run.arrived[step] for step in sorted(run.arrived)]
    pace = median(later - earlier for earlier, later in pairwise(before[5:]))
    time.sleep(chance.random() * pace)  # anywhere in a step
    name = choose(pool, run, victim)
    killed, at = time.monotonic(), run.step
    pool.kill(name)
    had = pool.last_reported(name)
    outcome = run.finish()
    noticed, started = run.first("worker-lost", killed), run.first("started", killed)
    assert noticed is not None, "the pool has not noticed the loss"
    if (started is not None) != restart:
        raise SystemExit(f"the job {'did not restart' if restart else 'went back to a checkpoint'}\n{run.story()}")
    # A restart publishes nothing twice: what comes after it has been run after it.
    following = had + 1 if started is None else min(step for step, when in run.arrived.items() if when > started)
    pool.start_worker(LocalWorker(name))
    run.until(lambda: joined(pool, WORKERS))
    replay = run.replay()
    return Loss(
        victim=victim,
        step=at,
        median_step=pace,
        noticed=noticed - killed,
        next_step=run.arrived[following] - killed,
        replayed_steps=None if replay is None else replay[0],
        in_place=None if replay is None else replay[1] - killed,
        started=None if started is None else started - killed,
        different=tuple(differences(undisturbed, outcome)),
    )


@dataclass(frozen=True)
class Result:
    """All kills of one setting."""

    setting: str
    workload: str
    adoptions: list[Loss]
    restarts: list[Loss]
    collecting: Sample
    """Seconds to bring all state to the coordinator."""
    cores_taken_by_others: float

    @property
    def heavy_in_place(self) -> Sample:
        """Heavy rescheduling after each kill, put together as the module says, until a step could begin."""
        return Sample(
            tuple(loss.started + self.collecting.median for loss in self.restarts if loss.started is not None)
        )

    @property
    def heavy(self) -> Sample:
        """The same until a step is done."""
        steps = (loss.median_step for loss in self.restarts if loss.started is not None)
        return Sample(tuple(ready + step for ready, step in zip(self.heavy_in_place.values, steps, strict=True)))

    @property
    def in_place(self) -> Sample:
        """Adoption after each kill, until replay began."""
        return Sample(tuple(loss.in_place for loss in self.adoptions if loss.in_place is not None))

    @property
    def within_timeout(self) -> int:
        """Kills after which the next step came within the failure timeout and two median steps."""
        return sum(loss.next_step <= FAILURE_TIMEOUT + 2 * loss.median_step for loss in self.adoptions)

    @property
    def within_three_steps(self) -> int:
        """Kills after which the next step came within three median steps from the notice."""
        return sum(loss.after_notice <= 3 * loss.median_step for loss in self.adoptions)

    @property
    def same_bits(self) -> bool:
        return not any(loss.different for loss in (*self.adoptions, *self.restarts))

    def to_json(self) -> dict[str, object]:
        return {
            "setting": self.setting,
            "workload": self.workload,
            "checkpoint_every": CHECKPOINT_EVERY,
            "cores_taken_by_others": self.cores_taken_by_others,
            "same_bits": self.same_bits,
            "within_failure_timeout_and_2_steps": self.within_timeout,
            "within_3_steps_of_the_notice": self.within_three_steps,
            "adoptions": [asdict(loss) for loss in self.adoptions],
            "restarts": [asdict(loss) for loss in self.restarts],
            "collecting_seconds": self.collecting.values,
            "heavy_rescheduling_seconds": self.heavy.values,
            "heavy_in_place_seconds": self.heavy_in_place.values,
            "heavy_over_adoption": self.heavy.median / times(self.adoptions).median,
            "heavy_over_adoption_in_place": self.heavy_in_place.median / self.in_place.median,
        }


def times(losses: Sequence[Loss]) -> Sample:
    return Sample(tuple(loss.next_step for loss in losses))


def measure(setting: Setting, workload: Workload, text: Path, kills: int, seed: int, codec: str, policy: str) -> Result:
    spec = workload.job(text, workers=len(WORKERS), fragments=len(WORKERS), policy=policy)
    spec["checkpoint"] = {"every": CHECKPOINT_EVERY}
    spec["fault_tolerance"] = {"failure_timeout": FAILURE_TIMEOUT}
    spec["compression"] = {"codec": codec}
    job = capture_job(*read_job(spec))
    adoptions: list[Loss] = []
    restarts: list[Loss] = []
    disturbance = Disturbance()
    with tempfile.TemporaryDirectory() as folder, shaped_pool(Path(folder), WORKERS, setting.bits_per_second) as pool:
        seconds = []
        for _ in range(UNDISTURBED):
            run = Timed(pool, job)
            undisturbed = run.finish()
            seconds.append(collecting(run, undisturbed))
        chance = random.Random(seed)
        for number in range(kills):
            victim = VICTIMS[number % len(VICTIMS)]
            for kind, restart in ((adoptions, False), (restarts, True)):
                loss = lose(pool, job, victim, chance, undisturbed, restart=restart)
                kind.append(loss)
                print(
                    f"{setting.name}, {victim} worker, {'restart' if restart else 'adoption'}: noticed after "
                    f"{loss.noticed:.2f} s, next step after {loss.next_step:.2f} s (a step takes {loss.median_step:.2f} s)",
                    file=sys.stderr,
                    flush=True,
                )
    collected_seconds = Sample(tuple(took for took in seconds if took is not None))
    cores = round(disturbance.cores(), 2)
    return Result(setting.name, workload.describe(), adoptions, restarts, collected_seconds, cores)


def rows_of(result: Result) -> list[list[str]]:
    adopted = times(result.adoptions)
    noticed = Sample(tuple(loss.after_notice for loss in result.adoptions))
    steps = Sample(tuple(loss.median_step for loss in (*result.adoptions, *result.restarts)))
    after = Sample(tuple(loss.after_notice / loss.median_step for loss in result.adoptions))

    def row(name: str, sample: Sample, note: str = "") -> list[str]:
        ratio = sample.median / adopted.median
        return [name, f"{sample.median:.2f}", sample.spread(digits=2), f"{ratio:.1f}", note]

    in_place = result.in_place
    replayed = [loss.replayed_steps or 0 for loss in result.adoptions]
    count = len(result.adoptions)
    bits = "same bits" if result.same_bits else "OTHER BITS"
    return [
        [f"{result.setting}: a step", f"{steps.median:.2f}", steps.spread(digits=2), "", bits],
        row(
            "  adoption, from the kill",
            adopted,
            f"{result.within_timeout}/{count} <= timeout + 2 steps; replayed {min(replayed)}..{max(replayed)}",
        ),
        [
            "  adoption, from the notice",
            f"{noticed.median:.2f}",
            noticed.spread(digits=2),
            "",
            f"{after.median:.1f} steps ({after.spread()}); {result.within_three_steps}/{count} <= 3",
        ],
        row("  restart from a checkpoint", times(result.restarts), f"one every {CHECKPOINT_EVERY} steps"),
        row("  heavy rescheduling", result.heavy, f"collecting {result.collecting.median:.2f} s of it"),
        ["  adoption in place", f"{in_place.median:.2f}", in_place.spread(digits=2), "", "nothing replayed yet"],
        [
            "  heavy rescheduling in place",
            f"{result.heavy_in_place.median:.2f}",
            result.heavy_in_place.spread(digits=2),
            f"{result.heavy_in_place.median / in_place.median:.1f}",
            "over adoption in place",
        ],
    ]


def torchft(python: str, workload: Workload, text: Path, kills: int) -> dict[str, Any]:
    """The same model in as many replicas under torchft; its program says what came of it in one line of JSON."""
    done = subprocess.run(
        [python, str(ROOT / "benchmarks" / "torchft_replicas.py"), workload.to_json(), str(text), str(kills)],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"torchft_replicas.py failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def row_of_torchft(theirs: dict[str, Any]) -> list[str]:
    recovered = [seconds for seconds in theirs["next_step_seconds"] if seconds is not None]
    stuck = len(theirs["next_step_seconds"]) - len(recovered)
    note = f"a step takes {theirs['median_step']:.2f} s; stuck for a minute: {stuck}"
    sample = Sample(tuple(recovered))
    if not recovered:
        return ["torchft, loopback", "", "", "", note]
    return ["torchft, loopback", f"{sample.median:.2f}", sample.spread(digits=2), "", note]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="of each kind in each setting")
    parser.add_argument("--setting", type=int, choices=range(len(SETTINGS)), help="only this one of the settings")
    parser.add_argument("--after", type=int, default=SETTLED, help="the step after which workers are killed")
    parser.add_argument("--width", type=int, default=128, help="of the model")
    parser.add_argument(
        "--yardstick", action="store_true", help="the batch of slow_network.py: eight times as many tokens"
    )
    parser.add_argument("--codec", default="none", help="of activations and gradients (default: %(default)s)")
    parser.add_argument("--policy", help=f"how the model is cut (default: {POLICY}, with a lossy codec {FIXED})")
    parser.add_argument("--seed", type=int, default=0, help="chooses the moments")
    parser.add_argument("--torchft", metavar="PYTHON", help="an interpreter that has torch and torchft")
    options = parser.parse_args()
    os.environ.update(ONE_THREAD)
    # Ended from outside, it still stops its processes and removes its networks.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    about = machine()
    unshaped = shaping.unavailable()
    results: list[Result] = []
    rows: list[list[str]] = []
    data: dict[str, object] = {
        "machine": about,
        "target": "next step <= failure_timeout + 2 median steps after the kill, <= 3 median steps after the notice; "
        "heavy rescheduling takes 14 times as long",
        "failure_timeout": FAILURE_TIMEOUT,
        "killed_after_step": options.after,
    }
    with tempfile.TemporaryDirectory() as folder:
        text = write_training_text(Path(folder))
        batch = YARDSTICK if options.yardstick else Workload()
        base = replace(batch, width=options.width, steps=options.after + LEFT)
        for setting in SETTINGS if options.setting is None else [SETTINGS[options.setting]]:
            if setting.bits_per_second is not None and unshaped is not None:
                print(f"{setting.name} is left out: {unshaped}", file=sys.stderr)
                continue
            policy = options.policy or (POLICY if options.codec == "none" else FIXED)
            result = measure(setting, base, text, options.kills, options.seed, options.codec, policy)
            results.append(result)
            rows += rows_of(result)
        if options.torchft:
            theirs = torchft(options.torchft, base, text, options.kills)
            data["torchft"] = theirs
            rows.append(row_of_torchft(theirs))
    data["results"] = [result.to_json() for result in results]
    # One setting or another model must not take the place of the record.
    names = ["recovery", *([] if options.setting is None else [str(options.setting)])]
    names += ["yardstick"] if options.yardstick else []
    names += [] if options.width == Workload().width else [f"width_{options.width}"]
    names += [] if options.after == SETTLED else [f"after_{options.after}"]
    names += [] if options.codec == "none" else [options.codec]
    names += [] if options.policy is None else [options.policy]
    report(
        "_".join(names),
        "From kill -9 to the next completed step",
        ["setting", "seconds", "spread", "over adoption", ""],
        rows,
        data,
    )


if __name__ == "__main__":
    main()
