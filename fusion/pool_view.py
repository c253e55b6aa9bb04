"""A pool as `fusion top` shows it: takes the items of the pool's stream, and draws workers, jobs, rates and the story."""

from __future__ import annotations

from collections import deque
from datetime import datetime
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fusion.client import StreamItem
from fusion.run_view import sparkline
from fusion.units import format_bytes, format_pace, format_seconds, plural

RECENT_STEPS = 20
_STORY_LINES = 8
_ENDED_SHOWN = 5
_ENDED = frozenset({"done", "failed", "cancelled"})
_COLOURS = {
    "idle": "green",
    "busy": "cyan",
    "running": "cyan",
    "done": "green",
    "draining": "yellow",
    "preparing": "yellow",
    "queued": "yellow",
    "lost": "red",
    "failed": "red",
}


class Rates:
    """The course of one job's latest steps."""

    def __init__(self) -> None:
        self._steps: deque[dict[str, Any]] = deque(maxlen=RECENT_STEPS)
        self.losses: deque[float] = deque(maxlen=200)

    def add(self, metric: dict[str, Any]) -> None:
        if self._steps and metric["step"] <= self._steps[-1]["step"]:
            return
        self._steps.append(metric)
        if metric.get("loss") is not None:
            self.losses.append(float(metric["loss"]))

    def per_second(self, key: str) -> float | None:
        """Sum of `key` over the latest steps by their duration; None when there is nothing to say."""
        known = [metric for metric in self._steps if metric.get(key) is not None]
        seconds = sum(float(metric["step_seconds"]) for metric in known)
        return sum(float(metric[key]) for metric in known) / seconds if seconds > 0 else None

    @property
    def step_seconds(self) -> float | None:
        return sum(float(metric["step_seconds"]) for metric in self._steps) / len(self._steps) if self._steps else None


class PoolView:
    """What is known of a pool so far."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.problem = ""
        """Why what is shown may be old."""
        self.workers: dict[str, dict[str, Any]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.rates: dict[str, Rates] = {}
        self.story: deque[dict[str, Any]] = deque(maxlen=_STORY_LINES)

    def start_anew(self) -> None:
        """A new stream begins with every worker: those that it does not name have left."""
        self.workers.clear()
        self.problem = ""

    def take(self, item: StreamItem) -> None:
        data = item.data
        if item.kind == "worker":
            if data["state"] == "left":
                self.workers.pop(data["name"], None)
            else:
                self.workers[data["name"]] = data
        elif item.kind == "job":
            self.jobs[data["id"]] = data
        elif item.kind == "metrics":
            self.rates.setdefault(data["job"], Rates()).add(data)
            job = self.jobs.get(data["job"])
            if job is not None:
                job.update(step=data["step"], loss=data.get("loss"), step_seconds=data["step_seconds"])
        elif item.kind == "event" and (not self.story or data["seq"] > self.story[-1]["seq"]):
            self.story.append(data)

    def draw(self, now: float) -> RenderableType:
        """Everything, at `now` (seconds since the epoch)."""
        live = [worker for worker in self.workers.values() if worker["state"] != "lost"]
        busy = sum(worker["state"] in ("busy", "draining") for worker in live)
        running = sum(job["state"] == "running" for job in self.jobs.values())
        head = Text.assemble(
            ("fusion", "bold"),
            f"  {self.url}  {_moment(now)}  {len(live)} {plural('worker', len(live))}, {busy} busy  {running} running  ",
            (f"sent {self._total_rate()}", "cyan"),
        )
        parts: list[RenderableType] = [head]
        if self.problem:
            parts.append(Text(self.problem, style="red"))
        parts += [self._jobs(), self._workers(now)]
        parts += [Text(f"{_moment(event['time'])}  {event['message']}", style="dim") for event in self.story]
        return Group(*parts)

    def _total_rate(self) -> str:
        running = [
            self.rates[job] for job, shown in self.jobs.items() if shown["state"] == "running" and job in self.rates
        ]
        return f"{format_bytes(sum(rates.per_second('sent_bytes') or 0.0 for rates in running))}/s"

    def _jobs(self) -> Table:
        table = _table("job", "state", "step", "loss", "", "s/step", "speed", "sent/s", "left")
        ended = [job for job in self.jobs.values() if job["state"] in _ENDED][-_ENDED_SHOWN:]
        for job in [*ended, *(job for job in self.jobs.values() if job["state"] not in _ENDED)]:
            rates = self.rates.get(job["id"], Rates())
            going = job["state"] == "running"
            pace = format_pace(rates.per_second("tokens"), rates.per_second("samples"))
            sent = rates.per_second("sent_bytes")
            seconds = rates.step_seconds or job["step_seconds"]
            table.add_row(
                Text(job["id"]),
                _state(job["state"], job["reason"]),
                f"{job['step']}/{job['steps']}",
                "-" if job["loss"] is None else f"{job['loss']:.4f}",
                Text(sparkline(list(rates.losses), 16), style="cyan"),
                format_seconds(seconds) if seconds else "-",
                pace if going else "-",
                f"{format_bytes(sent)}/s" if going and sent is not None else "-",
                format_seconds((job["steps"] - job["step"]) * seconds) if going and seconds else "-",
            )
        return table

    def _workers(self, now: float) -> Table:
        table = _table("worker", "state", "job", "fragments", "device", "memory", "speed", "up")
        for worker in self.workers.values():
            device = worker["device"]
            limit = format_bytes(device["memory_bytes"]) if device["memory_bytes"] else "-"
            table.add_row(
                Text(worker["name"]),
                _state(worker["state"]),
                Text(worker["job"] or "-"),
                ", ".join(map(str, worker["fragments"])) or "-",
                Text(f"{device['kind']}, {device['threads']} thr."),
                f"{format_bytes(worker['memory_used_bytes'])} / {limit}",
                f"{device['flops_per_second'] / 1e9:,.0f} GFLOP/s",
                format_seconds(max(0.0, now - worker["joined_at"])),
            )
        return table


def _table(*columns: str) -> Table:
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, no_wrap=True, overflow="ellipsis")
    return made


def _state(state: str, reason: str = "") -> Text:
    text = Text(state, style=_COLOURS.get(state, ""))
    return text.append(f" {reason}", style="dim") if reason else text


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%H:%M:%S")
