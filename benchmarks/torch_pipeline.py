"""Helper of `pipelining.py` and `slow_network.py`: torch.distributed.pipelining over gloo, one process a stage, equal split
by blocks.

`python torch_pipeline.py WORKLOAD_JSON TEXT STAGES SCHEDULES [PLACES_JSON]` starts the ranks, trains under each schedule
(`gpipe,1f1b`) and prints JSON by schedule: step times of the last rank, which computes the loss, the losses, and the processor
time per step of all ranks together. PLACES puts each rank into a network namespace:
`{"namespaces": [...], "address": of the first rank, "device": to talk over}`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, SplitPoint, pipeline

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import namespaces
from benchmarks.common import Workload, load_gpt
from benchmarks.plain_loop import batches


def rank_main(workload: Workload, text: Path, schedules: str) -> dict[str, object] | None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {name: train(workload, text, name) for name in schedules.split(",")}
    last = dist.get_rank() == dist.get_world_size() - 1
    dist.destroy_process_group()
    return found if last else None


def train(workload: Workload, text: Path, schedule_name: str) -> dict[str, object]:
    rank, stages = dist.get_rank(), dist.get_world_size()
    gpt = load_gpt()
    torch.manual_seed(0)
    model = gpt.build(**workload.model_args)
    example = torch.zeros(workload.micro_batch, workload.sequence_length, dtype=torch.int64)
    per_stage = workload.layers // stages
    splits = {f"blocks.{index * per_stage}": SplitPoint.BEGINNING for index in range(1, stages)}
    pipe = pipeline(model, mb_args=(example,), split_spec=splits)
    stage = pipe.build_stage(rank, torch.device("cpu"))
    make = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[schedule_name]
    schedule = make(stage, n_microbatches=workload.micro_batches, loss_fn=gpt.loss)
    optimizer = torch.optim.AdamW(stage.submod.parameters(), lr=3e-4)
    last = rank == stages - 1
    times, losses, processor = [], [], []
    before = time.perf_counter()
    for inputs, targets in batches(workload, text):
        step_losses: list[torch.Tensor] = []
        if rank == 0:
            schedule.step(inputs)
        elif last:
            schedule.step(target=targets, losses=step_losses)
        else:
            schedule.step()
        optimizer.step()
        optimizer.zero_grad()
        if last:
            losses.append(sum(loss.item() for loss in step_losses) / workload.micro_batches)
        now = time.perf_counter()
        times.append(now - before)
        processor.append(time.process_time())
        before = now
    spent = torch.tensor((processor[-1] - processor[workload.warm_up - 1]) / (workload.steps - workload.warm_up))
    dist.all_reduce(spent)
    return {"step_seconds": times, "losses": losses, "cpu_seconds": spent.item()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    workload, text, stages, schedule = sys.argv[1:5]
    if "RANK" in os.environ:
        if "NAMESPACE" in os.environ:
            namespaces.enter(os.environ["NAMESPACE"])
        result = rank_main(Workload.from_json(workload), Path(text), schedule)
        if result is not None:
            print(json.dumps(result))
        return
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": stages}
    own: list[dict[str, str]] = [{"RANK": str(rank)} for rank in range(int(stages))]
    if len(sys.argv) > 5:
        places = json.loads(sys.argv[5])
        shared |= {"MASTER_ADDR": places["address"], "GLOO_SOCKET_IFNAME": places["device"]}
        for rank, namespace in zip(own, places["namespaces"], strict=True):
            rank["NAMESPACE"] = namespace
    ranks = [subprocess.Popen([sys.executable, __file__, *sys.argv[1:5]], env={**shared, **rank}) for rank in own]
    if codes := [code for rank in ranks if (code := rank.wait()) != 0]:
        raise SystemExit(codes[0])


if __name__ == "__main__":
    main()
