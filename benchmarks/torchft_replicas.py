"""Helper of `recovery.py`: a replica of the model in each of four processes under torchft; one of them is killed.

`python torchft_replicas.py WORKLOAD_JSON TEXT KILLS` prints JSON: seconds from `kill -9` to the next step that the others
committed (null: none within a minute), and the median step before. Every replica takes one micro-batch of the global batch; torchft's timeouts are its defaults
(a replica counts as dead after 5 s without a heartbeat).
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Workload, load_gpt
from benchmarks.plain_loop import batches

SETTLED = 15
START_SECONDS = 180
PATIENCE_SECONDS = 60
JOIN_SECONDS = 60
"""How long a quorum waits for replicas that live: the default of torchft's own lighthouse program."""


def replica(workload: Workload, text: Path, rank: int) -> None:
    """Train until killed; prints after each committed step how many took part."""
    from torchft import (  # type: ignore[import-not-found]
        DistributedDataParallel,
        Manager,
        Optimizer,
        ProcessGroupGloo,
    )

    torch.set_num_threads(1)
    gpt = load_gpt()
    torch.manual_seed(0)
    model = gpt.build(**workload.model_args)
    plain = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": plain.state_dict()}

    def load(found: dict[str, Any]) -> None:
        model.load_state_dict(found["model"])
        plain.load_state_dict(found["optimizer"])

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=60)),
        load_state_dict=load,
        state_dict=state,
        min_replica_size=2,
        replica_id=f"replica_{rank}",
        store_addr="127.0.0.1",
        store_port=store.port,
        hostname="127.0.0.1",
        rank=0,
        world_size=1,
    )
    wrapped = DistributedDataParallel(manager, model)
    optimizer = Optimizer(manager, plain)
    for inputs, targets in batches(workload, text):
        mine = slice(rank * workload.micro_batch, (rank + 1) * workload.micro_batch)
        before = manager.current_step()
        optimizer.zero_grad()
        gpt.loss(wrapped(inputs[mine]), targets[mine]).backward()
        optimizer.step()
        if manager.current_step() > before:
            print(manager.num_participants(), flush=True)


def kill_one(workload: str, text: str, replicas: int) -> tuple[float | None, float]:
    """Start the replicas, kill one; seconds to the next step that the others commit, and the median step before."""
    from torchft.coordination import LighthouseServer  # type: ignore[import-not-found]

    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=2, join_timeout_ms=JOIN_SECONDS * 1000)
    port = lighthouse.address().rpartition(":")[2]
    environment = {**os.environ, "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}"}
    committed: queue.Queue[tuple[int, float]] = queue.Queue()
    children = [
        subprocess.Popen(
            [sys.executable, __file__, workload, text, "replica", str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(replicas)
    ]

    def read(child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            committed.put((int(line), time.monotonic()))

    try:
        threading.Thread(target=read, args=(children[0],), daemon=True).start()
        times: list[float] = []
        while len(times) < SETTLED:
            participants, at = committed.get(timeout=START_SECONDS)
            times = [*times, at] if participants == replicas else []
        pace = median(later - earlier for earlier, later in pairwise(times[-10:]))
        killed = time.monotonic()
        children[-1].kill()
        while True:
            try:
                participants, at = committed.get(timeout=PATIENCE_SECONDS)
            except queue.Empty:
                return None, pace
            if participants < replicas:
                return at - killed, pace
    finally:
        for child in children:
            child.kill()
            child.wait()
        lighthouse.shutdown()


def main() -> None:
    workload, text = sys.argv[1:3]
    if sys.argv[3] == "replica":
        replica(Workload.from_json(workload), Path(text), int(sys.argv[4]))
        return
    given = Workload.from_json(workload)
    endless = Workload(**{**json.loads(workload), "steps": 100_000}).to_json()
    taken = [kill_one(endless, text, given.micro_batches) for _ in range(int(sys.argv[3]))]
    seconds, paces = zip(*taken, strict=True)
    print(json.dumps({"next_step_seconds": seconds, "median_step": median(paces)}))


if __name__ == "__main__":
    main()
