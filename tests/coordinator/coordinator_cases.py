"""What the coordinator's tests share: a tiny job, an equal-ops planner, fake workers over real ZeroMQ, a real server."""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import aiohttp
import zmq
import zmq.asyncio
from aiohttp import web

from coordinator.config import CoordinatorConfig
from coordinator.control import Control
from coordinator.daemon import make_engine
from coordinator.engine import Engine
from coordinator.entry import access as access_module
from coordinator.entry.access import Access
from coordinator.http.api import make_app
from coordinator.life.books import Timing
from coordinator.life.jobs import Job
from coordinator.plans.planning import Candidate
from coordinator.submission import train_config
from dag.cut import cut_points
from dag.graph import Op, OpDag, Parameter, Ref, TensorMeta
from dag.serialize import dumps
from fusion.errors import PlanError
from fusion.messages import (
    Adopt,
    Adopted,
    Backup,
    BackupFailed,
    BlobRef,
    CantAdopt,
    CaughtUp,
    CheckpointPart,
    Connect,
    Connected,
    DataManifest,
    Device,
    EvaluationReport,
    Finished,
    FragmentTimes,
    Heartbeat,
    Holding,
    Paused,
    Prepare,
    Ready,
    Shutdown,
    Start,
    StepReport,
    Stop,
    ToCoordinator,
    ToWorker,
    TrainConfig,
    decode_to_worker,
    encode,
)
from fusion.plan import Plan
from fusion.sockets import new_keys, secure_client
from fusion.spec import JobSpec
from fusion.wire import PROTOCOL_VERSION

TIMING = Timing(failure_timeout=1.0, drain_patience=5.0, restart_grace=0.5)


def tensors_file(tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """A safetensors file from name -> (dtype, shape, raw bytes)."""
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(raw)]}
        offset += len(raw)
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + b"".join(raw for _, _, raw in tensors.values())


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def tiny_dag() -> OpDag:
    """Two tied linear layers, a buffer that is not persistent, a constant, and an unused state-dict entry in the blob."""
    matrix, batch = TensorMeta((2, 2), "float32"), TensorMeta((4, 2), "float32")
    scalar = TensorMeta((), "float32")
    ops = (
        Op(0, "inputs", "placeholder", "inputs", outputs=(batch,)),
        Op(1, "targets", "placeholder", "targets", outputs=(batch,)),
        Op(2, "w1", "parameter", "first.weight", outputs=(matrix,), requires_grad=True),
        Op(3, "w2", "parameter", "second.weight", outputs=(matrix,), requires_grad=True),
        Op(4, "scale", "buffer", "scale", outputs=(TensorMeta((2,), "float32"),)),
        Op(5, "shift", "constant", "constant/shift", outputs=(TensorMeta((2,), "float32"),)),
        _call(6, "aten.linear.default", (Ref(0), Ref(2)), batch, "first"),
        _call(7, "aten.mul.Tensor", (Ref(6), Ref(4)), batch, "middle"),
        _call(8, "aten.add.Tensor", (Ref(7), Ref(5)), batch, "middle"),
        _call(9, "aten.linear.default", (Ref(8), Ref(3)), batch, "second"),
        _call(10, "aten.mse_loss.default", (Ref(9), Ref(1)), scalar, ""),
        Op(11, "loss", "loss", "loss", (Ref(10),), outputs=(scalar,), requires_grad=True),
    )
    parameters = (
        Parameter(2, "first.weight", ("head.weight",), 0),
        Parameter(3, "second.weight", (), 1),
    )
    return OpDag(ops, parameters, name="tiny")


def _call(number: int, target: str, args: tuple[Ref, ...], meta: TensorMeta, module: str) -> Op:
    return Op(number, f"op{number}", "call", target, args, outputs=(meta,), module=module, requires_grad=True, flops=16)


def weights_blob() -> bytes:
    return tensors_file(
        {
            "first.weight": ("F32", (2, 2), floats(1, 2, 3, 4)),
            "second.weight": ("F32", (2, 2), floats(5, 6, 7, 8)),
            "unused.half": ("BF16", (3,), bytes(range(6))),
            "scale": ("F32", (2,), floats(9, 9)),
            "constant/shift": ("F32", (2,), floats(0.5, 0.5)),
        }
    )


def data_blob(samples: int = 16) -> bytes:
    raw = floats(*(float(i) for i in range(samples * 2)))
    return tensors_file({"inputs": ("F32", (samples, 2), raw), "targets": ("F32", (samples, 2), raw)})


def ref_of(content: bytes) -> BlobRef:
    return BlobRef(digest=hashlib.sha256(content).hexdigest(), size=len(content))


_NO_DATA = DataManifest(kind="arrays", blob=ref_of(b""), samples=2, train_samples=1)


def spec_json(**changes: Any) -> dict[str, Any]:
    """A spec; `changes` are merged into its sections."""
    spec: dict[str, Any] = {
        "name": "tiny",
        "model": {"entrypoint": "model.py:build"},
        "loss": "mse",
        "data": {"arrays": "data.npz"},
        "train": {"steps": 6, "global_batch": 8, "micro_batch": 4},
        "plan": {},
        "fault_tolerance": {"failure_timeout": 1.0},
    }
    for section, value in changes.items():
        spec[section] = {**spec.get(section, {}), **value} if isinstance(value, dict) else value
    return spec


def job_spec(**changes: Any) -> JobSpec:
    return JobSpec.model_validate(spec_json(**changes))


def training(spec: JobSpec) -> TrainConfig:
    """What workers are told of the spec, with one sample more than is trained on."""
    return train_config(spec, _NO_DATA)


def job_record(spec: JobSpec, *, id: str = "job", number: int = 1, **fields: Any) -> Job:
    """The record of a job whose blobs nobody reads."""
    blob = _NO_DATA.blob
    return Job(id=id, number=number, spec=spec, dag=blob, weights=blob, data=_NO_DATA, train=training(spec), **fields)


def equal_ops(
    dag: OpDag, candidates: Sequence[Candidate], spec: JobSpec, train: TrainConfig, previous: Plan | None
) -> Plan:
    """As many fragments as workers (or as asked), equal numbers of ops, in order; the roomiest workers, if a number is asked for."""
    if previous is None:
        roomiest = sorted(candidates, key=lambda each: -each.device.memory_bytes)[: spec.plan.workers]
        candidates = [each for each in candidates if each in roomiest]
    needed = sum(dag.ops[parameter.op].meta.nbytes for parameter in dag.parameters)
    small = [candidate for candidate in candidates if 0 < candidate.device.memory_bytes < needed]
    if small:
        raise PlanError(f"fragment 0 needs {needed} B, {small[0].name} has {small[0].device.memory_bytes} B")
    names = [candidate.name for candidate in candidates]
    if previous is not None:
        cuts = previous.cuts
    else:
        legal = [point.position for point in cut_points(dag)]
        count = min(spec.plan.fragments or len(names), len(legal) + 1)
        cuts = tuple(legal[len(legal) * index // count] for index in range(1, count))
    placement = tuple(names[index * len(names) // (len(cuts) + 1)] for index in range(len(cuts) + 1))
    return Plan(policy="equal-ops", cuts=cuts, placement=placement, in_flight=(1,) * len(placement))


class Server:
    """A coordinator with its real HTTP server and control channel, on free ports."""

    def __init__(self, engine: Engine, control: Control, access: Access, url: str, session: aiohttp.ClientSession):
        self.engine = engine
        self.control = control
        self.access = access
        self.url = url
        self.session = session

    async def call(self, method: str, path: str, token: str | None = "operator", **kwargs: Any) -> tuple[int, Any]:
        """A request; returns status and JSON (or bytes). `token`: `operator`, `join`, None or the token itself."""
        tokens = {"operator": self.access.operator_token, "join": self.access.join_token}
        headers = dict(kwargs.pop("headers", {}))
        if token is not None:
            headers["Authorization"] = f"Bearer {tokens.get(token, token)}"
        async with self.session.request(method, self.url + path, headers=headers, **kwargs) as response:
            if response.content_type == "application/json":
                return response.status, await response.json()
            return response.status, await response.read()

    async def put(self, content: bytes) -> BlobRef:
        ref = ref_of(content)
        status, answer = await self.call("PUT", f"/api/v1/blobs/{ref.digest}", "join", data=content)
        assert status in (200, 201), answer
        return ref

    async def submission(self, resume: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        """Upload a tiny job's blobs; returns the body of its submission."""
        data = await self.put(data_blob())
        body: dict[str, Any] = {
            "spec": spec_json(**changes),
            "dag": (await self.put(dumps(tiny_dag()))).model_dump(),
            "weights": (await self.put(weights_blob())).model_dump(),
            "data": {"kind": "arrays", "blob": data.model_dump(), "samples": 16, "train_samples": 12, "feeds": {}},
        }
        if resume is not None:
            body["resume"] = resume
        return body

    async def submit(self, resume: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        status, job = await self.call("POST", "/api/v1/jobs", json=await self.submission(resume, **changes))
        assert status == 201, job
        assert isinstance(job, dict)
        return job

    async def job(self, job: str) -> dict[str, Any]:
        status, shown = await self.call("GET", f"/api/v1/jobs/{job}")
        assert status == 200
        assert isinstance(shown, dict)
        return shown

    async def until(self, job: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Follow the job's stream until its JSON satisfies `condition`."""
        with self.engine.publisher.watch(None) as watcher:
            async with asyncio.timeout(20):
                while not condition(shown := await self.job(job)):
                    assert await watcher.next() is not None
        return shown

    async def until_state(self, job: str, state: str) -> dict[str, Any]:
        return await self.until(job, lambda shown: shown["state"] == state)


@asynccontextmanager
async def serving(
    state: Path, planner: Any = equal_ops, timing: Timing = TIMING, **settings: Any
) -> AsyncIterator[Server]:
    """Run a coordinator over `state`."""
    await asyncio.to_thread(state.mkdir, parents=True, exist_ok=True)
    config = CoordinatorConfig(state=state, port=0, timing=timing, heartbeat_seconds=0.1, **settings)
    engine = make_engine(config, planner)
    access = access_module.load(state)
    control = Control(access.keys, engine.on_message, engine.on_closed)
    remembered = state / "control.port"
    control.start("127.0.0.1", int(remembered.read_text()) if remembered.exists() else 0)
    remembered.write_text(str(control.port))
    engine.start(control)
    runner = web.AppRunner(make_app(engine, access), shutdown_timeout=0.5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    async with aiohttp.ClientSession() as session:
        try:
            yield Server(engine, control, access, f"http://127.0.0.1:{port}", session)
        finally:
            engine.publisher.close()
            await runner.cleanup()
            await engine.close()


class FakeWorker:
    """Speaks the control protocol; trains by making numbers up. Loss after step s is 1/s.

    Snapshots go from one fake worker to another without a network: `peers` are all of a server, by name.
    """

    peers: ClassVar[WeakKeyDictionary[Server, dict[str, FakeWorker]]] = WeakKeyDictionary()

    def __init__(self, server: Server, name: str, memory: int = 0) -> None:
        self.server = server
        self.name = name
        self.memory = memory
        self.endpoint = "tcp://127.0.0.1:1"
        self.keys = new_keys()
        self.incarnation = ""
        self.refused = 0
        """What it says of messages that it has turned away."""
        self.received: list[ToWorker] = []
        self.weights = b""
        """The weights blob of the last job it prepared."""
        self.evicted = asyncio.Event()
        self.stopped = asyncio.Event()
        self.cant_adopt = False
        self.deaf_to_backups = False
        """Holds no snapshots and says nothing of them."""
        self.held: dict[int, int] = {}
        """Fragment -> step of the snapshot that was sent here last."""
        self._pause_after: int | None = None
        self._changed = asyncio.Event()
        self._prepared: Prepare | None = None
        self._plan: Plan | None = None
        self._done: dict[int, int] = {}
        """Fragment hosted here -> the last step that it has finished."""
        self._order: Backup | None = None
        self._finished_epoch = -1
        self._adopted: list[int] = []
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._tasks: list[asyncio.Task[None]] = []
        self._training: asyncio.Task[None] | None = None

    @property
    def pause_after(self) -> int | None:
        """Report no step after this one."""
        return self._pause_after

    @pause_after.setter
    def pause_after(self, step: int | None) -> None:
        self._pause_after = step
        self._changed.set()

    def join_body(self, **changes: Any) -> dict[str, Any]:
        return {
            "name": self.name,
            "protocol_version": PROTOCOL_VERSION,
            "fusion_version": "0",
            "torch_version": "2",
            "device": Device(memory_bytes=self.memory, flops_per_second=1e9).model_dump(),
            "data_endpoint": self.endpoint,
            "public_key": self.keys.public,
            **changes,
        }

    async def __aenter__(self) -> FakeWorker:
        status, answer = await self.server.call("POST", "/api/v1/workers", "join", json=self.join_body())
        assert status == 201, answer
        self.incarnation = answer["incarnation"]
        self.peers.setdefault(self.server, {})[self.name] = self
        secure_client(self._socket, self.keys, answer["control_public_key"])
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._socket.connect(answer["control_endpoint"])
        self._tasks = [
            asyncio.create_task(self._beat(answer["heartbeat_seconds"])),
            asyncio.create_task(self._listen()),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    async def die(self) -> None:
        """Go silent, as if killed."""
        self.peers.get(self.server, {}).pop(self.name, None)
        tasks = [*self._tasks, *([self._training] if self._training else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks, self._training = [], None
        if not self._socket.closed:
            self._socket.close(0)
            self._context.term()

    async def say(self, message: ToCoordinator) -> None:
        await self._socket.send(encode(message))

    async def _beat(self, seconds: float) -> None:
        while True:
            await self.say(Heartbeat(incarnation=self.incarnation, memory_used_bytes=5, refused=self.refused))
            await asyncio.sleep(seconds)

    async def _listen(self) -> None:
        while True:
            message = decode_to_worker(await self._socket.recv())
            self.received.append(message)
            match message:
                case Prepare():
                    await self._prepare(message)
                case Start():
                    self._training = asyncio.create_task(self._train())
                case Backup():
                    await self._ordered(message)
                case Adopt():
                    await self._adopt(message)
                case Connect():
                    await self.say(Connected(job=message.job, peers=[peer.worker for peer in message.peers]))
                case Stop():
                    if self._training is not None:
                        self._training.cancel()
                        self._training = None
                    self._done, self._order, self.held = {}, None, {}
                    self.stopped.set()
                case Shutdown():
                    self.evicted.set()
            self._changed.set()

    async def _prepare(self, message: Prepare) -> None:
        self._prepared, self._plan = message, message.plan
        first = message.resume.step if message.resume else 0
        self._done = dict.fromkeys(message.plan.fragments_of(self.name), first)
        self._finished_epoch = -1
        status, self.weights = await self.server.call("GET", f"/api/v1/blobs/{message.weights.digest}", "join")
        assert status == 200
        await self.say(Ready(job=message.job, epoch=message.plan.epoch))

    async def _ordered(self, order: Backup) -> None:
        if self._done and max(self._done.values()) >= order.step:
            fragment = next(iter(self._done))
            await self.say(
                BackupFailed(job=order.job, epoch=order.epoch, step=order.step, fragment=fragment, cause="passed")
            )
        else:
            self._order = order

    async def take_snapshot(self, order: Backup, fragment: int) -> None:
        """A host has sent a fragment's snapshot here."""
        if self.deaf_to_backups:
            return
        self.held[fragment] = order.step
        await self.say(Holding(job=order.job, epoch=order.epoch, step=order.step, fragment=fragment, bytes=8))

    async def _adopt(self, message: Adopt) -> None:
        if self.cant_adopt:
            await self.say(CantAdopt(job=message.job, epoch=message.plan.epoch, message="out of memory"))
            return
        mine = message.plan.fragments_of(self.name)
        fresh = [fragment for fragment in mine if fragment not in self._done]
        started = self._prepared is not None and self._prepared.resume is not None and self._prepared.resume.step
        for fragment in fresh:
            assert message.step == (started or 0) or self.held.get(fragment) == message.step
        self._done = {fragment: self._done.get(fragment, message.step) for fragment in mine}
        self._plan, self._order, self._adopted = message.plan, None, fresh
        if self._training is None:
            self._training = asyncio.create_task(self._train())
        await self.say(Adopted(job=message.job, epoch=message.plan.epoch, fragments=fresh))

    async def _train(self) -> None:
        assert self._prepared is not None
        train = self._prepared.train
        while True:
            self._changed.clear()
            step = min(self._done.values(), default=train.steps) + 1
            order = self._order
            if self._adopted and step > max(self._done.values()):
                await self._caught_up()
            if order is not None and step > order.step:
                if not order.hold:
                    self._order = None
            elif step <= train.steps and (self.pause_after is None or step <= self.pause_after):
                await self._step(self._prepared, step)
                continue
            elif step > train.steps and self._done and self._plan and self._finished_epoch != self._plan.epoch:
                self._finished_epoch = self._plan.epoch
                await self.say(Finished(job=self._prepared.job, epoch=self._plan.epoch))
            if order is None or self._order is not None:
                await self._changed.wait()

    async def _caught_up(self) -> None:
        assert self._prepared is not None
        assert self._plan is not None
        fragments, self._adopted = self._adopted, []
        await self.say(
            CaughtUp(job=self._prepared.job, epoch=self._plan.epoch, fragments=fragments, steps=1, seconds=0.01)
        )

    async def _step(self, prepared: Prepare, step: int) -> None:
        """One step of those fragments here that are at it."""
        plan, train, job = self._plan, prepared.train, prepared.job
        assert plan is not None
        mine = [fragment for fragment, done in self._done.items() if done == step - 1]
        has_loss = len(plan.placement) - 1 in mine
        for fragment in mine:
            self._done[fragment] = step
        times = [FragmentTimes(fragment=index, forward=0, backward=0, update=0) for index in mine]
        await self.say(
            StepReport(
                job=job,
                epoch=plan.epoch,
                step=step,
                fragments=times,
                loss=1 / step if has_loss else None,
                sent_bytes=100,
            )
        )
        if has_loss and train.eval_every and train.eval_batches and step % train.eval_every == 0:
            await self.say(EvaluationReport(job=job, epoch=plan.epoch, step=step, loss=2 / step, batches=1))
        if step == train.steps or (train.checkpoint_every and step % train.checkpoint_every == 0):
            for index in mine:
                await self._upload_part(prepared, index, step)
        if (order := self._order) is not None and order.step == step:
            for index in mine:
                holder = self.peers[self.server].get(order.backups.get(index, ""))
                if holder is not None:
                    await holder.take_snapshot(order, index)
            if order.hold:
                await self.say(Paused(job=job, epoch=order.epoch, step=step))

    async def _upload_part(self, prepared: Prepare, fragment: int, step: int) -> None:
        assert self._plan is not None
        content = part_blob(fragment, len(prepared.plan.placement), step)
        ref = ref_of(content)
        status, _ = await self.server.call("PUT", f"/api/v1/blobs/{ref.digest}", "join", data=content)
        if status in (200, 201):
            await self.say(
                CheckpointPart(job=prepared.job, epoch=self._plan.epoch, step=step, fragment=fragment, blob=ref)
            )


def part_blob(fragment: int, fragments: int, step: int) -> bytes:
    """Fragment 0 holds the first parameter, the last one the second (with one fragment: both)."""
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {
        f"optimizer/step/f{fragment}": ("F32", (1,), floats(step))
    }
    if fragment == 0:
        tensors["parameter/first.weight"] = ("F32", (2, 2), floats(step, 1, 1, 1))
        tensors["optimizer/exp_avg/first.weight"] = ("F32", (2, 2), floats(step, 0, 0, 0))
    if fragment == fragments - 1:
        tensors["parameter/second.weight"] = ("F32", (2, 2), floats(step, 2, 2, 2))
    return tensors_file(tensors)
