"""A coordinator in the test's event loop: real HTTP and a real control channel, but it does only what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import time
from typing import Any

from aiohttp import web

from coordinator.control import Control
from fusion.messages import JoinRequest, JoinResponse, ToCoordinator, ToWorker
from fusion.sockets import KeyPair, new_keys

TOKEN = "join-token"


class FakeCoordinator:
    """`refuse` answers the next joins with (status, error); messages of workers collect in `messages`."""

    def __init__(self) -> None:
        self.keys: KeyPair = new_keys()
        self.blobs: dict[str, bytes] = {}
        self.joined: list[JoinRequest] = []
        self.incarnations: dict[str, str] = {}
        self.messages: list[tuple[str, ToCoordinator]] = []
        self.refuse: tuple[int, str] | None = None
        self.retry_after: str | None = None
        """Said with a refusal."""
        self.refuse_uploads = False
        self.ahead = 0.0
        """Seconds that our clock is ahead of the workers'."""
        self.port = 0
        self._control_port = 0
        self._changed = asyncio.Condition()
        self._runner: web.AppRunner | None = None
        self.control: Control | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}?token={TOKEN}"

    async def start(self, *, knows_its_workers: bool = True) -> None:
        """Start, or start again on the same ports with the same keys."""
        self.control = Control(self.keys, self._on_message)
        self._control_port = self.control.start("127.0.0.1", self._control_port)
        if knows_its_workers:
            self.admit_again()
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/api/v1/workers", self._join)
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/api/v1/blobs/{digest}", self._get)
        app.router.add_put("/api/v1/blobs/{digest}", self._put)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    def admit_again(self) -> None:
        """Let the workers that joined before connect."""
        assert self.control is not None
        for request in self.joined:
            self.control.admit(request.public_key, self.incarnations[request.name])

    async def refusal(self) -> None:
        """Wait until a connection to the control channel was refused."""
        assert self.control is not None
        loop, refused = asyncio.get_running_loop(), asyncio.Event()
        self.control._gatekeeper._on_refused = lambda *_: loop.call_soon_threadsafe(refused.set)
        await asyncio.wait_for(refused.wait(), 60)

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        if self.control is not None:
            await self.control.close()
            self.control = None

    def send(self, worker: str, message: ToWorker) -> None:
        assert self.control is not None
        self.control.send(self.incarnations[worker], message)

    async def until(self, holds: Callable[[], Any]) -> Any:
        """Wait until `holds()` is true after some message or join; returns what it returned."""
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(holds), 60)
            return holds()

    async def message(self, worker: str, *kinds: type[Any]) -> Any:
        """Wait for a worker's first message of these types."""
        return await self.until(lambda: next(iter(self.of(worker, *kinds)), None))

    def of(self, worker: str, *kinds: type[Any]) -> list[Any]:
        names = {incarnation: name for name, incarnation in self.incarnations.items()}
        return [m for incarnation, m in self.messages if names.get(incarnation) == worker and isinstance(m, kinds)]

    def _on_message(self, incarnation: str, message: ToCoordinator) -> None:
        self.messages.append((incarnation, message))
        self._stir()

    def _stir(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        task = asyncio.ensure_future(notify())
        task.add_done_callback(lambda _: None)

    async def _join(self, request: web.Request) -> web.Response:
        if self.refuse is not None:
            status, error = self.refuse
            headers = {"Retry-After": self.retry_after} if self.retry_after is not None else None
            return web.json_response({"error": error}, status=status, headers=headers)
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.json_response({"error": "wrong token"}, status=401)
        asked = JoinRequest.model_validate(await request.json())
        assert self.control is not None
        self.joined.append(asked)
        self.incarnations[asked.name] = f"{asked.name}#{len(self.joined)}"
        self.control.admit(asked.public_key, self.incarnations[asked.name])
        answer = JoinResponse(
            worker=asked.name,
            incarnation=self.incarnations[asked.name],
            control_endpoint=f"tcp://127.0.0.1:{self._control_port}",
            control_public_key=self.keys.public,
            heartbeat_seconds=0.2,
            time=time() + self.ahead,
        )
        self._stir()
        return web.json_response(answer.model_dump(mode="json"), status=201)

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _get(self, request: web.Request) -> web.Response:
        data = self.blobs.get(request.match_info["digest"])
        if data is None:
            return web.json_response({"error": "no such blob"}, status=404)
        return web.Response(status=206, body=data[request.http_range])

    async def _put(self, request: web.Request) -> web.Response:
        if self.refuse_uploads:
            return web.json_response({"error": "no space left on the coordinator's disk"}, status=507)
        self.blobs[request.match_info["digest"]] = await request.read()
        return web.Response(status=201)
