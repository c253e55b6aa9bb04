"""Blobs: ranges only of what is needed; hostile and damaged ones are refused before memory is taken."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import AsyncIterator, Callable

import aiohttp
import pytest
import safetensors.torch
import torch
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.errors import BlobError, CoordinatorError, UnreachableError
from fusion.messages import BlobRef
from worker.jobs.fetch import Fetcher, TensorEntry, coalesce, read_entries
from worker.jobs.state_blob import StateBlob

TOKEN = "secret"


def ref(data: bytes) -> BlobRef:
    return BlobRef(digest=hashlib.sha256(data).hexdigest(), size=len(data))


class Server:
    """Serves blobs with ranges; `spoil` changes what is sent."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.ranges: list[str] = []
        self.spoil: Callable[[bytes], bytes] = lambda data: data
        self.breaks_after: int | None = None
        """Every connection breaks after so many bytes of a blob."""
        self.url = ""

    def add(self, data: bytes) -> BlobRef:
        made = ref(data)
        self.blobs[made.digest] = data
        return made

    async def get(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.json_response({"error": "wrong token"}, status=401)
        data = self.blobs.get(request.match_info["digest"])
        if data is None:
            return web.json_response({"error": "no such blob"}, status=404)
        self.ranges.append(request.headers["Range"])
        part = request.http_range
        if self.breaks_after is not None:
            broken = web.StreamResponse(status=206)
            broken.content_length = len(data[part])
            await broken.prepare(request)
            await broken.write(data[part][: self.breaks_after])
            assert request.transport is not None
            request.transport.close()
            return broken
        return web.Response(status=206, body=self.spoil(data[part]))

    async def put(self, request: web.Request) -> web.Response:
        data = await request.read()
        if len(data) > 1000:
            return web.json_response({"error": "the disk is full"}, status=507)
        self.blobs[request.match_info["digest"]] = data
        return web.Response(status=201)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    app = web.Application()
    app.router.add_get("/api/v1/blobs/{digest}", made.get)
    app.router.add_put("/api/v1/blobs/{digest}", made.put)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    await runner.cleanup()


@pytest.fixture
async def fetcher(server: Server) -> AsyncIterator[Fetcher]:
    async with aiohttp.ClientSession() as session:
        yield Fetcher(session, server.url, TOKEN, attempts=1)


async def test_only_the_tensors_asked_for_cross_the_network(server: Server, fetcher: Fetcher) -> None:
    tensors = {
        "a": torch.randn(3, 4),
        "big": torch.zeros(2**20),
        "c": torch.arange(5),
        "flag": torch.tensor(True),
        "half": torch.randn(7).bfloat16(),
        "none": torch.empty(0, 3),
    }
    made = server.add(safetensors.torch.save(tensors))
    file = await fetcher.open(made)
    wanted = ["a", "c", "flag", "half", "none"]
    found = await file.tensors(wanted)
    assert list(found) == wanted
    assert all(torch.equal(found[name], tensors[name]) for name in wanted)
    assert all(found[name].data_ptr() % 64 == 0 for name in wanted)
    assert fetcher.fetched_bytes < 4096
    assert len(server.ranges) <= 4


async def test_whole_blobs_are_checked_by_their_hash(server: Server, fetcher: Fetcher) -> None:
    made = server.add(b"hello")
    assert await fetcher.whole(made, 100) == b"hello"
    with pytest.raises(BlobError, match="is over"):
        await fetcher.whole(made, 4)
    server.spoil = lambda data: bytes(byte ^ 1 for byte in data)
    with pytest.raises(BlobError, match="does not match its hash"):
        await fetcher.whole(made, 100)
    server.spoil = lambda data: data[:-1]
    with pytest.raises(BlobError, match="is cut"):
        await fetcher.whole(made, 100)
    server.spoil = lambda data: data + b"!"
    with pytest.raises(BlobError, match="more bytes came"):
        await fetcher.whole(made, 100)


async def test_errors_of_the_coordinator_are_one_line(server: Server, fetcher: Fetcher) -> None:
    with pytest.raises(CoordinatorError, match=r"no such blob \(404\)"):
        await fetcher.whole(ref(b"unknown"), 100)
    with pytest.raises(CoordinatorError, match="the disk is full") as full:
        await fetcher.upload(StateBlob({"x": torch.zeros(500)}))
    assert full.value.status == 507
    assert (await fetcher.upload(StateBlob({"x": torch.zeros(5)}))).digest in server.blobs
    async with aiohttp.ClientSession() as session:
        nowhere = Fetcher(session, "http://127.0.0.1:1", TOKEN, attempts=1)
        with pytest.raises(UnreachableError, match="does not answer"):
            await nowhere.whole(ref(b"x"), 10)


async def test_a_header_that_promises_too_much_is_refused(server: Server, fetcher: Fetcher) -> None:
    for data in (b"", b"1234567", struct.pack("<Q", 2**63) + b"x" * 100, struct.pack("<Q", 200) + b"x" * 100):
        with pytest.raises(BlobError, match="no tensor file"):
            await fetcher.open(server.add(data))
    with pytest.raises(BlobError, match="has no tensor 'b'"):
        await (await fetcher.open(server.add(safetensors.torch.save({"a": torch.ones(2)})))).tensors(["b"])


async def test_after_a_broken_connection_only_the_rest_is_read(server: Server) -> None:
    data = bytes(range(200))
    made = server.add(data)
    server.breaks_after = 60
    async with aiohttp.ClientSession() as session:
        patient = Fetcher(session, server.url, TOKEN, attempts=2)
        assert await patient.whole(made, 1000) == data
        assert server.ranges == ["bytes=0-199", "bytes=60-199", "bytes=120-199", "bytes=180-199"]
        assert patient.fetched_bytes == 200
        server.breaks_after = 0
        with pytest.raises(UnreachableError):
            await patient.whole(made, 1000)


def header(**tensors: object) -> bytes:
    return json.dumps(tensors).encode()


def entry(offsets: object = (0, 8), dtype: object = "F32", shape: object = (2,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a":1,"a":1}', "stands twice"),
        (b'{"a":1}', "not described by an object"),
        (header(a=entry(dtype="F99")), "known: F64"),
        (header(a=entry(dtype=["F32"])), "has dtype"),
        (header(a=entry(shape=[-2])), "no valid shape"),
        (header(a=entry(shape=[True])), "no valid shape"),
        (header(a=entry(shape=[1] * 99)), "no valid shape"),
        (header(a=entry(shape=[2**61, 2**61])), "needs"),
        (header(a=entry(offsets=[8, 0])), "needs 8 bytes"),
        (header(a=entry(offsets=[0, 4])), "needs 8 bytes"),
        (header(a=entry(offsets=[0])), "no valid offsets"),
        (header(a=entry(offsets=[10**6, 10**6 + 8])), "the blob has only"),
        (header(a=entry(), b=entry(offsets=[4, 12])), "overlaps"),
    ],
)
def test_hostile_headers(data: bytes, message: str) -> None:
    with pytest.raises(BlobError, match=message):
        read_entries(data, 8 + len(data) + 16)


@given(st.binary(max_size=100) | st.text(max_size=100).map(str.encode), st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_random_headers_are_refused_or_harmless(data: bytes, size: int) -> None:
    try:
        entries = read_entries(data, size)
    except BlobError:
        return
    assert all(found.end <= size for found in entries.values())


def test_neighbours_are_read_together() -> None:
    def at(begin: int, end: int) -> TensorEntry:
        return TensorEntry(f"t{begin}", torch.uint8, (end - begin,), begin, end)

    far = 10 * 2**20
    ranges = coalesce([at(far, far + 10), at(0, 100), at(100, 200), at(1000, 1200)])
    assert [(begin, end, len(members)) for begin, end, members in ranges] == [(0, 1200, 3), (far, far + 10, 1)]
