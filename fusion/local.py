"""A pool on this machine: a coordinator and workers as child processes on loopback, for `fusion up` and the Python API.

The children are the ordinary daemons. Each one's standard input is a pipe from here: when this process ends, however it
ends, the pipe closes and the child leaves, so a pool never outlives its owner.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from fusion.client import Client, StreamItem
from fusion.errors import JobFailedError, ServiceError, UserError
from fusion.follow import follow
from fusion.import_views import OUR_ROOT

START_SECONDS = 90.0
STOP_SECONDS = 10.0
_PROFILE_SECONDS = 0.6
_SHORT_PROFILE_SECONDS = 0.1
"""Not enough for what takes a regression (`worker.machine.profile`)."""
_TAIL_LINES = 12


@dataclass(frozen=True)
class LocalWorker:
    """One worker to start."""

    name: str
    threads: int = 1
    memory_limit: int | None = None
    """Bytes."""
    device: str = "cpu"
    speed: float | None = None
    """FLOP/s as declared; default: measured."""


@dataclass
class _Child:
    name: str
    process: subprocess.Popen[bytes]
    log: Path
    started_at: float
    """Seconds since the epoch."""


class LocalPool:
    """A coordinator and its workers. Use as a context manager; leaving it stops every child.

    `folder` gets `state/` (the coordinator's) and `logs/`. Workers that `topology` names have the links of it, and are
    slowed down as its speeds relate; without `act_out` only plans are made for it. `host` is where the coordinator listens,
    `worker_module` what workers run (`python -m`). Raises `ServiceError` when a child does not come up, with its last lines.
    """

    def __init__(
        self,
        folder: Path,
        workers: Sequence[LocalWorker],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        dashboard: bool = True,
        topology: Path | None = None,
        act_out: bool = True,
        start_seconds: float = START_SECONDS,
        worker_module: str = "fusion",
    ) -> None:
        self.folder = folder
        self.workers = tuple(workers)
        self.url = ""
        self.token = ""
        self._join_url = ""
        self._host = host
        self._port = port
        self._dashboard = dashboard
        self._topology = topology
        self._act_out = act_out
        self._start_seconds = start_seconds
        self._worker_module = worker_module
        self._children: list[_Child] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start everything; returns as soon as the coordinator answers (the workers join meanwhile)."""
        try:
            (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: can't make the run's folder: {error.strerror or error}") from None
        self.start_coordinator()
        for worker in self.workers:
            # All measure the same machine, so one says what takes longer to find out; the last, as it joins last anyway.
            last = worker is self.workers[-1]
            self.start_worker(worker, _PROFILE_SECONDS if last else _SHORT_PROFILE_SECONDS)

    def start_coordinator(self) -> None:
        """Start the coordinator; again after it was killed, with the state and the port that it had."""
        port = urlsplit(self.url).port if self.url else self._port
        arguments = ["coordinator", "--host", self._host, "--port", str(port)]
        arguments += ["--state", str(self.folder / "state"), "--local"]
        if not self._dashboard:
            arguments.append("--no-dashboard")
        if self._topology is not None:
            arguments += ["--topology", str(self._topology.resolve())]
        coordinator = self._spawn("coordinator", arguments, stdout=subprocess.PIPE)
        ready = self._ready_line(coordinator)
        self.url, self.token, self._join_url = str(ready["url"]), str(ready["token"]), str(ready["join_url"])

    def start_worker(self, worker: LocalWorker, profile_seconds: float = _SHORT_PROFILE_SECONDS) -> None:
        """Start one worker, or one more; returns before it has joined. It measures itself for about `profile_seconds`."""
        arguments = ["worker", "--name", worker.name, "--device", worker.device]
        arguments += ["--threads", str(worker.threads), "--local"]
        arguments += ["--profile-seconds", str(profile_seconds)]
        if worker.memory_limit is not None:
            arguments += ["--memory-limit", str(worker.memory_limit)]
        if worker.speed is not None:
            arguments += ["--speed", str(worker.speed)]
        if self._topology is not None and self._act_out:
            arguments += ["--topology", str(self._topology.resolve())]
        self._spawn(worker.name, arguments, threads=worker.threads, module=self._worker_module)

    def kill(self, name: str) -> None:
        """`kill -9` this child, as a power cut would; it may be started again. Raises `KeyError` when there is none."""
        child = next((child for child in self._children if child.name == name), None)
        if child is None:
            raise KeyError(name)
        child.process.kill()
        self.forget(name)

    def forget(self, name: str) -> int:
        """A child has ended, or is about to, and that is as it should be: wait for it. Returns its exit code."""
        child = next(child for child in self._children if child.name == name)
        code = child.process.wait()
        if child.process.stdin is not None:
            with suppress(OSError):
                child.process.stdin.close()
        with self._lock:
            self._children.remove(child)
        return code

    def client(self) -> Client:
        return Client(self.url, self.token)

    def wait_for_workers(self) -> None:
        """Return when every worker has joined. Raises `ServiceError` when one died or did not come in time."""
        stirred: Queue[object] = Queue()
        over = threading.Event()
        threading.Thread(target=self._listen, args=(stirred, over), daemon=True).start()
        try:
            self._wait_for_workers(stirred)
        finally:
            over.set()

    def _wait_for_workers(self, stirred: Queue[object]) -> None:
        wanted = {worker.name for worker in self.workers}
        deadline = time.monotonic() + self._start_seconds
        with self.client() as client:
            while True:
                joined = {str(worker["name"]) for worker in client.workers()}
                if wanted <= joined:
                    return
                self._refuse_dead()
                if time.monotonic() > deadline:
                    missing = ", ".join(sorted(wanted - joined))
                    raise ServiceError(
                        f"{missing} did not join within {self._start_seconds:.0f} s; see {self.folder / 'logs'}"
                    )
                try:
                    # The news wakes us at once; the timeout is for deaths, which are no news of the coordinator.
                    stirred.get(timeout=0.25)
                except Empty:
                    continue

    def watch(self, job: str, show: Callable[[StreamItem], None]) -> dict[str, Any]:
        """Show a job's items as they come until it has ended; return it in its final state.

        Raises `ServiceError` when the coordinator or all workers die on the way, `JobFailedError` where the workers that there are
        can't do the job: it would wait for others.
        """
        items: Queue[StreamItem | BaseException] = Queue()

        def read() -> None:
            try:
                with self.client() as client:
                    for item in follow(client, job, give_up_seconds=10):
                        items.put(item)
            except BaseException as error:
                items.put(error)

        threading.Thread(target=read, daemon=True, name="follow").start()
        while True:
            try:
                item = items.get(timeout=0.5)
            except Empty:
                self._refuse_dead(all_workers=True)
                continue
            if isinstance(item, BaseException):
                self._refuse_dead(all_workers=True)
                raise item
            show(item)
            if item.kind != "job":
                continue
            if item.data.get("state") in ("done", "failed", "cancelled"):
                return item.data
            complete = len(self._children) > len(self.workers) and not self._dead()
            if complete and item.data.get("refused") and item.data.get("plan") is None:
                raise JobFailedError(f"job {job} can't be trained on these workers: {item.data['reason']}")

    def stop(self) -> None:
        """Stop all children; kills what does not leave in time."""
        with self._lock:
            children, self._children = self._children, []
        for child in children:
            if child.process.stdin is not None:
                with suppress(OSError):  # it is gone already
                    child.process.stdin.close()
        deadline = time.monotonic() + STOP_SECONDS
        for child in children:
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()

    def process_ids(self) -> dict[str, int]:
        """Child name -> process id."""
        return {child.name: child.process.pid for child in self._children}

    def started_at(self) -> dict[str, float]:
        """Child name -> when this process of it was started (seconds since the epoch)."""
        return {child.name: child.started_at for child in self._children}

    def _spawn(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        stdout: int | None = None,
        threads: int = 1,
        module: str = "fusion",
    ) -> _Child:
        log = self.folder / "logs" / f"{name}.log"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("FUSION_")}
        if self._join_url:
            environment["FUSION_JOIN"] = (
                self._join_url
            )  # not an argument: those are for everybody on the machine to see
        # Set before the child imports torch: spinning threads of several processes would slow each other down by far.
        environment["OMP_NUM_THREADS"] = str(threads)
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        # -P keeps the working folder off the path: a person's own worker.py there is none of the child's business.
        paths = [str(OUR_ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        started_at = time.time()
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=output if stdout is None else stdout,
                stderr=output,
                env=environment,
                # Ctrl-C at the terminal is for us; the children are told by us.
                start_new_session=True,
            )
        child = _Child(name, process, log, started_at)
        self._children.append(child)
        return child

    def _ready_line(self, child: _Child) -> dict[str, Any]:
        """The JSON line that the coordinator prints when it answers."""
        lines: Queue[bytes] = Queue()
        pipe = child.process.stdout
        assert pipe is not None

        def read() -> None:
            # Goes on to the end, so that the child never blocks on a full pipe.
            with pipe:
                for line in pipe:
                    lines.put(line)
            lines.put(b"")

        threading.Thread(target=read, daemon=True).start()
        deadline = time.monotonic() + self._start_seconds
        while True:
            try:
                line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                raise ServiceError(
                    f"the coordinator did not answer in {self._start_seconds:.0f} s; see {child.log}"
                ) from None
            if not line:
                child.process.wait()
                raise self._died(child)
            try:
                ready = json.loads(line)
            except ValueError:
                continue
            if isinstance(ready, dict) and "url" in ready:
                return ready

    def _listen(self, stirred: Queue[object], over: threading.Event) -> None:
        try:
            with self.client() as client, closing(client.stream()) as items:
                for item in items:
                    if over.is_set():
                        return  # The pool has a pulse, so this is noticed soon.
                    stirred.put(item)
        except ServiceError:
            return  # the one who waits looks at the processes itself

    def _dead(self) -> list[_Child]:
        return [child for child in self._children if child.process.poll() is not None]

    def _refuse_dead(self, *, all_workers: bool = False) -> None:
        """Raise for a child that ended; with `all_workers` a worker may, as long as one is left."""
        dead = self._dead()
        if not dead:
            return
        coordinator_died = dead[0].name == "coordinator"
        if coordinator_died or not all_workers or len(dead) == len(self._children) - 1:
            raise self._died(dead[0])

    def _died(self, child: _Child) -> ServiceError:
        lines = [line for line in child.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        role = "the coordinator" if child.name == "coordinator" else f"worker {child.name}"
        told = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)
        if told is not None:
            return ServiceError(f"{role} could not go on: {told}")
        code = child.process.returncode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        tail = "\n".join(f"  {line}" for line in lines[-_TAIL_LINES:])
        return ServiceError(f"{role} {how}; its log is {child.log}" + (f"\n{tail}" if tail else ""))


def check_done(job: dict[str, Any]) -> None:
    """Raise `JobFailedError` unless the job is done."""
    if job.get("state") != "done":
        raise JobFailedError(f"job {job.get('id')} {job.get('state')}: {job.get('reason') or 'no reason given'}")
