"""Fuzzes one decoder guided by the branches that inputs reach, with atheris: `pip install -e '.[fuzz]'`, on Linux.

`python benchmarks/fuzz_guided.py dags -max_total_time=60`. What follows the decoder's name goes to libFuzzer. An input that brings
anything but the documented refusal ends the run, and is written to a file `crash-...`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    import atheris
except ImportError:
    raise SystemExit(
        "error: atheris is not installed; pip install -e '.[fuzz]' (Linux), or use benchmarks/fuzz.py"
    ) from None

with atheris.instrument_imports(include=["dag", "fusion", "worker.jobs.fetch"]):
    import msgpack

    from dag.serialize import MAGIC, SCHEMA_VERSION, loads
    from fusion.errors import RefusedError, SpecError
    from fusion.messages import Heartbeat, decode_to_coordinator, decode_to_worker, encode
    from fusion.spec import JobSpec
    from fusion.wire import FrameKind, Header, decode_header, encode_header
    from fusion.yaml_file import load_model


def dag(data: bytes) -> None:
    """The content of an OP-DAG, under a right hash."""
    loads(msgpack.packb([MAGIC, SCHEMA_VERSION, sha256(data).digest(), data]))


def control(data: bytes) -> None:
    for read in (decode_to_coordinator, decode_to_worker):
        try:
            read(data)
        except RefusedError:
            continue


def spec(data: bytes) -> None:
    _FILE.write_bytes(data)
    load_model(_FILE, JobSpec, "job spec (YAML)")


_FOLDER = tempfile.TemporaryDirectory(prefix="fusion-fuzz-")
_FILE = Path(_FOLDER.name) / "job.yaml"
_SPEC = b"name: x\nmodel: {entrypoint: m.py:f}\nloss: mse\ndata: {arrays: d.npz}\ntrain: {steps: 1, global_batch: 2, micro_batch: 1}\n"
_HEADER = Header("job-1", 0, FrameKind.ACTIVATION, 0, 1, 0, "none", "float32", (2, 2))
DECODERS: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "frames": (decode_header, encode_header(_HEADER)),
    "control": (control, encode(Heartbeat(incarnation="a", memory_used_bytes=1))),
    "dags": (dag, msgpack.packb(["tiny", "", [], [], [[0, "w", [], 0]], [], []])),
    "specs": (spec, _SPEC),
}
"""Name -> the decoder, and an input that it nearly takes."""


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in DECODERS:
        raise SystemExit(f"error: which decoder? {', '.join(DECODERS)}")
    decode, seed = DECODERS[name]

    def feed(data: bytes) -> None:
        try:
            decode(data)
        except (RefusedError, SpecError):
            return

    corpus = Path(_FOLDER.name) / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(seed)
    atheris.Setup([sys.argv[0], *sys.argv[2:], str(corpus)], feed)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
