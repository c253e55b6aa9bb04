"""What the coordinator's tests share: a tiny job, an equal-ops planner, fake workers over real ZeroMQ, a real server."""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import zmq
import zmq.asyncio
from aiohttp import web

from coordinator import access as access_module
from coordinator.access import Access
from coordinator.api import make_app
from coordinator.config import CoordinatorConfig
from coordinator.control import Control
from coordinator.daemon import make_engine
from coordinator.engine import Engine
from coordinator.membership import Timing
from coordinator.planning import Candidate
from dag.cut import cut_points
from dag.graph import Op, OpDag, Parameter, Ref, TensorMeta
from dag.serialize import dumps
from fusion.errors import PlanError
from fusion.messages import (
    BlobRef,
    CheckpointPart,
    Device,
    EvaluationReport,
    Finished,
    FragmentTimes,
    Heartbeat,
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


def equal_ops(
    dag: OpDag, candidates: Sequence[Candidate], spec: JobSpec, train: TrainConfig, previous: Plan | None
) -> Plan:
    """As many fragments as workers (or as asked), equal numbers of ops, in order."""
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
    control = Control(access.keys, engine.on_message)
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
    """Speaks the control protocol; trains by making numbers up. Loss after step s is 1/s."""

    def __init__(self, server: Server, name: str, memory: int = 0) -> None:
        self.server = server
        self.name = name
        self.memory = memory
        self.keys = new_keys()
        self.incarnation = ""
        self.received: list[ToWorker] = []
        self.weights = b""
        """The weights blob of the last job it prepared."""
        self.evicted = asyncio.Event()
        self.stopped = asyncio.Event()
        self.pause_after: int | None = None
        """Stop reporting steps after this one."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._tasks: list[asyncio.Task[None]] = []
        self._training: asyncio.Task[None] | None = None

    def join_body(self, **changes: Any) -> dict[str, Any]:
        return {
            "name": self.name,
            "protocol_version": PROTOCOL_VERSION,
            "fusion_version": "0",
            "torch_version": "2",
            "device": Device(memory_bytes=self.memory, flops_per_second=1e9).model_dump(),
            "data_endpoint": "tcp://127.0.0.1:1",
            "public_key": self.keys.public,
            **changes,
        }

    async def __aenter__(self) -> FakeWorker:
        status, answer = await self.server.call("POST", "/api/v1/workers", "join", json=self.join_body())
        assert status == 201, answer
        self.incarnation = answer["incarnation"]
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
            await self.say(Heartbeat(incarnation=self.incarnation, memory_used_bytes=5))
            await asyncio.sleep(seconds)

    async def _listen(self) -> None:
        prepared: Prepare | None = None
        while True:
            message = decode_to_worker(await self._socket.recv())
            self.received.append(message)
            match message:
                case Prepare():
                    prepared = message
                    status, self.weights = await self.server.call(
                        "GET", f"/api/v1/blobs/{message.weights.digest}", "join"
                    )
                    assert status == 200
                    await self.say(Ready(job=message.job, epoch=message.plan.epoch))
                case Start():
                    assert prepared is not None
                    self._training = asyncio.create_task(self._train(prepared))
                case Stop():
                    if self._training is not None:
                        self._training.cancel()
                        self._training = None
                    self.stopped.set()
                case Shutdown():
                    self.evicted.set()

    async def _train(self, prepared: Prepare) -> None:
        plan, train, job = prepared.plan, prepared.train, prepared.job
        mine = plan.fragments_of(self.name)
        has_loss = len(plan.placement) - 1 in mine
        for step in range(prepared.resume.step + 1 if prepared.resume else 1, train.steps + 1):
            if self.pause_after is not None and step > self.pause_after:
                await asyncio.Event().wait()
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
        await self.say(Finished(job=job, epoch=plan.epoch))

    async def _upload_part(self, prepared: Prepare, fragment: int, step: int) -> None:
        content = part_blob(fragment, len(prepared.plan.placement), step)
        ref = ref_of(content)
        status, _ = await self.server.call("PUT", f"/api/v1/blobs/{ref.digest}", "join", data=content)
        if status in (200, 201):
            await self.say(
                CheckpointPart(job=prepared.job, epoch=prepared.plan.epoch, step=step, fragment=fragment, blob=ref)
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
