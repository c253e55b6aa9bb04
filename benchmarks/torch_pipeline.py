"""Helper of `pipelining.py` and `slow_network.py`: torch.distributed.pipelining over gloo, one process a stage, equal split
by blocks.

`python torch_pipeline.py WORKLOAD_JSON DATA STAGES SCHEDULES [PLACES_JSON]` starts the ranks, trains under each schedule
(`gpipe,1f1b`) and prints JSON by schedule: step times of the last rank, which computes the loss, the losses, and the processor
time per step of all ranks together. PLACES puts each rank into a network namespace:
`{"namespaces": [...], "address": of the first rank, "device": to talk over, "slowdowns": [...], "task": one of torch_tasks.py}`;
a rank that is so many times slower rests after each forward, backward and update, as workers in local mode do.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, SplitPoint, pipeline

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import namespaces
from benchmarks.common import Workload
from benchmarks.torch_tasks import TASKS, Task
from worker.transport.surroundings import Surroundings


def rank_main(task: Task, schedules: str) -> dict[str, object] | None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {name: train(task, name) for name in schedules.split(",")}
    last = dist.get_rank() == dist.get_world_size() - 1
    dist.destroy_process_group()
    return found if last else None


def train(task: Task, schedule_name: str) -> dict[str, object]:
    rank, stages = dist.get_rank(), dist.get_world_size()
    workload = task.workload
    torch.manual_seed(0)
    splits = dict.fromkeys(task.splits(stages), SplitPoint.BEGINNING)
    pipe = pipeline(task.build(), mb_args=(task.example(),), split_spec=splits)
    stage = pipe.build_stage(rank, torch.device("cpu"))
    optimizer = task.optimizer(stage.submod)
    update = slowed(optimizer.step)
    stage.forward_one_chunk = slowed(stage.forward_one_chunk)  # type: ignore[method-assign]
    stage.backward_one_chunk = slowed(stage.backward_one_chunk)  # type: ignore[method-assign]
    make = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[schedule_name]
    schedule = make(stage, n_microbatches=workload.micro_batches, loss_fn=task.loss)
    last = rank == stages - 1
    times, losses, processor = [], [], []
    before = time.perf_counter()
    for inputs, targets in task.batches():
        step_losses: list[torch.Tensor] = []
        if rank == 0:
            schedule.step(inputs)
        elif last:
            schedule.step(target=targets, losses=step_losses)
        else:
            schedule.step()
        update()
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


def slowed(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same on a device that is as many times slower as the environment says."""
    surroundings = Surroundings(slowdown=float(os.environ.get("SLOWDOWN", "1")))

    def work_and_rest(*args: Any, **options: Any) -> Any:
        begin, busy_from = time.perf_counter(), time.thread_time()
        result = work(*args, **options)
        time.sleep(surroundings.rest(time.thread_time() - busy_from, time.perf_counter() - begin))
        return result

    return work_and_rest if surroundings.slowdown > 1 else work


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    workload, data, stages, schedules = sys.argv[1:5]
    places = json.loads(sys.argv[5]) if len(sys.argv) > 5 else {}
    if "RANK" in os.environ:
        if "NAMESPACE" in os.environ:
            namespaces.enter(os.environ["NAMESPACE"])
        task = TASKS[places.get("task", "gpt")](Workload.from_json(workload), Path(data))
        result = rank_main(task, schedules)
        if result is not None:
            print(json.dumps(result))
        return
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": stages}
    own: list[dict[str, str]] = [{"RANK": str(rank)} for rank in range(int(stages))]
    if "namespaces" in places:
        shared |= {"MASTER_ADDR": places["address"], "GLOO_SOCKET_IFNAME": places["device"]}
        for rank, namespace in zip(own, places["namespaces"], strict=True):
            rank["NAMESPACE"] = namespace
    for rank, slowdown in zip(own, places.get("slowdowns", []), strict=False):
        rank["SLOWDOWN"] = str(slowdown)
    ranks = [subprocess.Popen([sys.executable, __file__, *sys.argv[1:]], env={**shared, **rank}) for rank in own]
    if codes := [code for rank in ranks if (code := rank.wait()) != 0]:
        raise SystemExit(codes[0])


if __name__ == "__main__":
    main()
