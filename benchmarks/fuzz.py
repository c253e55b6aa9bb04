"""A million faulty inputs: frames, control messages, OP-DAGs, specs, tensor files and API calls; each is refused in words or harmless.

`python benchmarks/fuzz.py [--count 1000000] [--seed 0]`. Ends with 1 when anything but the documented error came out, when an API
call was answered with a 500 or with a status that the OpenAPI document does not have, or when memory grew. The number of a
crash brings its input back: `--only dags --case 123`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "coordinator"))

import aiohttp
import msgpack
import psutil
from coordinator_cases import FakeWorker, Server, serving, spec_json, tiny_dag
from pydantic import TypeAdapter
from yarl import URL

from benchmarks.common import report
from benchmarks.fuzz_inputs import any_request, changed, faulty_bytes, from_schema
from coordinator.http import api
from coordinator.http.openapi import document
from dag.cut import cut, cut_points
from dag.graph import SCHEMA_VERSION
from dag.serialize import MAGIC, dumps, loads
from fusion.errors import RefusedError, SpecError
from fusion.messages import ToCoordinator, ToWorker, decode_to_coordinator, decode_to_worker
from fusion.plan import Plan
from fusion.spec_file import load_spec, spec_from
from fusion.wire import FrameKind, Header, decode_header, encode_header
from worker.jobs.fetch import read_entries
from worker.protocol.admission import Admission

SHARES = {"frames": 0.4, "control": 0.26, "dags": 0.12, "specs": 0.1, "tensors": 0.08, "api": 0.04}
MAX_GROWTH_BYTES = 32 * 2**20
"""More than this between the first tenth of a target's inputs and its end counts as a leak."""
MAX_API_GROWTH_BYTES = 256 * 2**20
"""API calls of an operator leave jobs, tokens and blobs behind, which the coordinator rightly keeps."""
ALWAYS = {400, 404, 405, 413, 417}

Target = Callable[[Random], str]
"""Makes an input, feeds it, and returns what came of it: `accepted`, or how it was refused."""


def frames() -> Target:
    """Headers of the data channel through the decoder and the rules of admission."""
    dag = tiny_dag()
    partition = cut(dag, [cut_points(dag)[0].position])
    plan = Plan(policy="equal-ops", cuts=(cut_points(dag)[0].position,), placement=("a", "b"), in_flight=(1, 1))
    rules = Admission("job-1", plan, partition, "b", micro_batches=2, last_step=9, norms=(1, 1))
    shapes = [tuple(edge.meta.shape) for edge in partition.edges]

    def feed(random: Random) -> str:
        edge = random.randrange(len(shapes) + 1)
        shape = shapes[edge] if edge < len(shapes) else (1,)
        kind = random.choice(list(FrameKind))
        header = Header("job-1", 0, kind, edge, random.randrange(11), random.randrange(3), "none", "float32", shape)
        data = encode_header(header)
        if random.random() < 0.4:
            data = faulty_bytes(data, random)
        elif random.random() < 0.8:
            data = msgpack.packb(changed(msgpack.unpackb(data), random), default=str, use_bin_type=True)
        admitted = decode_header(data)
        rules.check(
            admitted, random.choice("abc"), [random.choice((0, 4, 32, 2**31)) for _ in range(random.randrange(3))]
        )
        return "accepted"

    return feed


def control() -> Target:
    """Messages of the control channel, both ways."""
    ends = [
        (TypeAdapter(kind).json_schema(), read)
        for kind, read in ((ToCoordinator, decode_to_coordinator), (ToWorker, decode_to_worker))
    ]

    def feed(random: Random) -> str:
        schema, read = random.choice(ends)
        value = from_schema(schema, schema["$defs"], random)
        for _ in range(random.choice((0, 1, 1, 2))):
            value = changed(value, random)
        data = _packed(value)
        read(faulty_bytes(data, random) if random.random() < 0.3 else data)
        return "accepted"

    return feed


def dags() -> Target:
    """OP-DAG files: changed bytes, and changed content under a right hash."""
    whole = dumps(tiny_dag())
    body = msgpack.unpackb(msgpack.unpackb(whole)[3])

    def feed(random: Random) -> str:
        if random.random() < 0.15:
            loads(faulty_bytes(whole, random))
            return "accepted"
        content = body
        for _ in range(random.choice((1, 1, 2, 3))):
            content = changed(content, random)
        packed = _packed(content)
        if random.random() < 0.15:
            packed = faulty_bytes(packed, random)
        loads(msgpack.packb([MAGIC, SCHEMA_VERSION, sha256(packed).digest(), packed]))
        return "accepted"

    return feed


def specs(folder: Path) -> Target:
    """Job specs as plain data, and some as files of YAML."""
    file = folder / "job.yaml"
    whole = spec_json(compression={"codec": "adatopk", "ratio": 100}, checkpoint={"every": 5, "keep": 3})

    def feed(random: Random) -> str:
        value = whole
        for _ in range(random.choice((1, 1, 2, 4))):
            value = changed(value, random)
        if random.random() < 0.05:
            text = json.dumps(value).encode()
            file.write_bytes(faulty_bytes(text, random) if random.random() < 0.7 else text)
            load_spec(file)
        elif isinstance(value, dict):
            spec_from(value)
        return "accepted"

    return feed


def tensors() -> Target:
    """Headers of safetensors files, as a worker reads them."""
    whole = {
        "__metadata__": {"step": "1"},
        "first": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "second": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
    }

    def feed(random: Random) -> str:
        value: Any = whole
        for _ in range(random.choice((1, 2, 3))):
            value = changed(value, random)
        data = json.dumps(value).encode()
        read_entries(
            faulty_bytes(data, random) if random.random() < 0.4 else data, random.choice((len(data) + 30, 10, 2**40))
        )
        return "accepted"

    return feed


def _packed(value: Any) -> bytes:
    """As msgpack; what it can't hold (integers beyond 64 bits, lone surrogates) goes as text."""
    try:
        packed: bytes = msgpack.packb(value)
    except (OverflowError, UnicodeEncodeError, ValueError):
        packed = msgpack.packb(json.dumps(value))
    return packed


@dataclass
class Outcome:
    """What came of one target's inputs."""

    inputs: int = 0
    seconds: float = 0.0
    results: Counter[str] = field(default_factory=Counter)
    crashes: list[str] = field(default_factory=list)
    memory_before: int = 0
    memory_after: int = 0

    @property
    def growth(self) -> int:
        return self.memory_after - self.memory_before

    def crash(self, case: int, error: object) -> None:
        self.results["crashed"] += 1
        if len(self.crashes) < 20:
            self.crashes.append(f"case {case}: {error!r}"[:500])


def play(name: str, target: Target, count: int, seed: int, first: int = 0) -> Outcome:
    outcome, begin = Outcome(inputs=count), time.perf_counter()
    for case in range(first, first + count):
        if case == first + count // 10:
            outcome.memory_before = _memory()
        try:
            outcome.results[target(Random(f"{seed}/{name}/{case}"))] += 1
        except (RefusedError, SpecError) as error:
            outcome.results[f"refused: {type(error).__name__}"] += 1
        except Exception as error:
            outcome.crash(case, error)
    outcome.memory_after, outcome.seconds = _memory(), time.perf_counter() - begin
    return outcome


async def play_api(count: int, seed: int, folder: Path, first: int = 0) -> Outcome:
    outcome, begin = Outcome(inputs=count), time.perf_counter()
    described = document(api.all_routes())
    async with _pool(folder) as (server, tokens, known, bodies):
        for case in range(first, first + count):
            if case == first + count // 10:
                outcome.memory_before = _memory()
            asked = any_request(described, tokens, known, Random(f"{seed}/api/{case}"), bodies)
            try:
                async with server.session.request(
                    asked.method,
                    URL(server.url + asked.path, encoded=True),
                    headers=asked.headers,
                    data=asked.body,
                    allow_redirects=False,
                ) as answer:
                    if answer.content_type != "text/event-stream":
                        await answer.read()
                    status = answer.status
            except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, ConnectionError):
                outcome.results["hung up on"] += 1  # A refused upload; the next call shows that the server lives.
                continue
            except (ValueError, aiohttp.ClientError) as error:
                outcome.results[f"not sent: {type(error).__name__}"] += 1
                continue
            answers = described["paths"][asked.template].get(asked.method.lower(), {}).get("responses", {})
            outcome.results[str(status)] += 1
            if status >= 500 or (status not in ALWAYS and str(status) not in answers):
                outcome.crash(case, f"{asked.method} {asked.path[:200]} answered {status}")
    outcome.memory_after, outcome.seconds = _memory(), time.perf_counter() - begin
    return outcome


@contextlib.asynccontextmanager
async def _pool(folder: Path) -> AsyncIterator[tuple[Server, list[str], dict[str, list[str]], dict[str, Any]]]:
    """A coordinator with a job that is done, and names that are known there."""
    async with serving(folder / "state", require_token=True) as server, FakeWorker(server, "a"):
        job = await server.submit(checkpoint={"every": 3})
        await server.until_state(job["id"], "done")
        digests = [(await server.put(b"blob")).digest, job_digest(server, job["id"])]
        access = server.access
        tokens = [access.operator_token] * 8 + [access.join_token, access.viewer_token, "wrong", "1a2b3c4d.x"]
        known = {"id": [job["id"]], "name": ["a"], "digest": digests, "step": ["3", "6"], "part": ["model"]}
        bodies = {"/api/v1/jobs": await server.submission(), "/api/v1/workers": FakeWorker(server, "b").join_body()}
        yield server, tokens, known, bodies


def job_digest(server: Server, job: str) -> str:
    return server.engine.lifecycle.jobs[job].dag.digest


def _memory() -> int:
    return int(psutil.Process(os.getpid()).memory_info().rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(SHARES))
    parser.add_argument("--case", type=int, help="with --only: this one input, with its traceback")
    options = parser.parse_args()
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        targets = {
            "frames": frames(),
            "control": control(),
            "dags": dags(),
            "specs": specs(folder),
            "tensors": tensors(),
        }
        if options.case is not None and options.only in targets:
            print(targets[options.only](Random(f"{options.seed}/{options.only}/{options.case}")))
            return
        for target, share in SHARES.items():
            if options.only not in (None, target):
                continue
            count = 1 if options.case is not None else round(options.count * (1 if options.only else share))
            first = options.case or 0
            if target == "api":
                outcomes[target] = asyncio.run(play_api(count, options.seed, folder, first))
            else:
                outcomes[target] = play(target, targets[target], count, options.seed, first)
            print(f"{target}: {outcomes[target].inputs} inputs in {outcomes[target].seconds:.0f} s", file=sys.stderr)
    _tell(outcomes, vars(options))


def _tell(outcomes: dict[str, Outcome], settings: dict[str, object]) -> None:
    rows, failed = [], []
    for name, outcome in outcomes.items():
        most = ", ".join(f"{what} {number:,}" for what, number in outcome.results.most_common())
        rows.append(
            [name, f"{outcome.inputs:,}", str(outcome.results["crashed"]), f"{outcome.growth / 2**20:.1f}", most]
        )
        failed += [f"{name}: {crash}" for crash in outcome.crashes]
        limit = MAX_API_GROWTH_BYTES if name == "api" else MAX_GROWTH_BYTES
        if outcome.growth > limit:
            failed.append(f"{name}: memory grew by {outcome.growth / 2**20:.0f} MiB")
    data = {
        name: {
            "inputs": outcome.inputs,
            "seconds": round(outcome.seconds, 1),
            "results": dict(outcome.results),
            "memory_growth_bytes": outcome.growth,
        }
        for name, outcome in outcomes.items()
    }
    columns = ["target", "inputs", "crashes", "memory, MiB", "what came of them"]
    report("fuzz", "Faulty inputs", columns, rows, {"settings": settings, "targets": data, "failures": failed})
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
