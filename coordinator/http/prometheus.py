"""The metrics page: read from the coordinator's state when Prometheus asks, so nothing can go stale."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from coordinator.engine import Engine
from coordinator.entry.tokens import Denial
from fusion import __version__
from fusion.wire import PROTOCOL_VERSION

_WORKER_STATES = ("joined", "idle", "busy", "draining", "lost")
_DENIALS = get_args(Denial)
_JOB_STATES = ("queued", "preparing", "running", "done", "failed", "cancelled")


class EngineCollector(Collector):
    """All of a coordinator's metrics."""

    def __init__(self, engine: Engine, denied: Mapping[str, int], refused: Mapping[int, int]) -> None:
        self._engine = engine
        self._denied = denied
        self._refused = refused

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        build = GaugeMetricFamily("fusion_build_info", "Version.", labels=["version", "protocol"])
        build.add_metric([__version__, str(PROTOCOL_VERSION)], 1)
        yield build
        yield GaugeMetricFamily(
            "fusion_coordinator_start_time_seconds", "Start, seconds since the epoch.", value=engine.started_at
        )
        yield GaugeMetricFamily(
            "fusion_coordinator_unwritten",
            "1 while nothing can be recorded, on a full disk say.",
            value=float(engine.store.behind is not None),
        )
        members = list(engine.lifecycle.pool)
        workers = GaugeMetricFamily("fusion_coordinator_workers", "Workers by state.", labels=["state"])
        count = Counter(str(member.state) for member in members)
        for state in _WORKER_STATES:
            workers.add_metric([state], count[state])
        yield workers
        yield GaugeMetricFamily(
            "fusion_coordinator_relayed_pairs",
            "Pairs of workers that can't reach each other and meet at a relay.",
            value=len(engine.lifecycle.relays.pairs([member.name for member in members])),
        )
        memory = GaugeMetricFamily("fusion_worker_memory_used_bytes", "Memory that a worker uses.", labels=["worker"])
        for member in members:
            if member.live:
                memory.add_metric([member.name], member.memory_used_bytes)
        yield memory
        turned_away = CounterMetricFamily(
            "fusion_worker_messages_refused_total",
            "Messages of its peers that a worker has refused.",
            labels=["worker"],
        )
        for member in members:
            if member.live:
                turned_away.add_metric([member.name], member.refused)
        yield turned_away
        yield from self._jobs()
        received = CounterMetricFamily(
            "fusion_coordinator_control_messages_total", "Control messages received.", labels=["type"]
        )
        for kind, number in sorted(engine.control.received.items()):
            received.add_metric([kind], number)
        yield received
        yield CounterMetricFamily(
            "fusion_coordinator_control_refused_total",
            "Control messages that were not understood.",
            value=engine.control.refused,
        )
        denied = CounterMetricFamily(
            "fusion_coordinator_http_denied_total", "HTTP requests that their token did not allow.", labels=["reason"]
        )
        for reason in _DENIALS:
            denied.add_metric([reason], self._denied.get(reason, 0))
        yield denied
        refused = CounterMetricFamily(
            "fusion_coordinator_http_refused_total",
            "HTTP requests that were answered with an error.",
            labels=["status"],
        )
        for status, number in sorted(self._refused.items()):
            refused.add_metric([str(status)], number)
        yield refused
        yield CounterMetricFamily(
            "fusion_coordinator_warnings_dropped_total",
            "Warnings of workers that were not kept, because they said too much.",
            value=engine.lifecycle.words.dropped,
        )

    def _jobs(self) -> Iterator[Metric]:
        jobs = self._engine.lifecycle.jobs.values()
        states = GaugeMetricFamily("fusion_coordinator_jobs", "Jobs by state.", labels=["state"])
        count = Counter(str(job.state) for job in jobs)
        for state in _JOB_STATES:
            states.add_metric([state], count[state])
        yield states
        labels = ["job", "name"]
        step = GaugeMetricFamily("fusion_job_step", "Last finished step.", labels=labels)
        loss = GaugeMetricFamily("fusion_job_loss", "Loss of the last finished step.", labels=labels)
        seconds = GaugeMetricFamily("fusion_job_step_seconds", "Duration of the last finished step.", labels=labels)
        epoch = GaugeMetricFamily("fusion_job_plan_epoch", "Epoch of the plan.", labels=labels)
        sent = CounterMetricFamily(
            "fusion_job_sent_bytes_total", "Bytes that the job's workers sent to each other.", labels=labels
        )
        recoveries = CounterMetricFamily(
            "fusion_job_recoveries_total", "Losses of workers after which the others went on.", labels=labels
        )
        restarts = CounterMetricFamily(
            "fusion_job_restarts_total", "Times that the job went back to its checkpoint.", labels=labels
        )
        commits = CounterMetricFamily(
            "fusion_job_snapshots_committed_total", "Common snapshots that other workers hold.", labels=labels
        )
        checks = CounterMetricFamily(
            "fusion_job_spot_checks_total",
            "Stretches of a fragment's steps that another worker has run again.",
            labels=[*labels, "result"],
        )
        for job in jobs:
            values = [job.id, job.spec.name]
            for result in ("passed", "failed", "void"):
                checks.add_metric([*values, result], getattr(job, f"checks_{result}"))
            sent.add_metric(values, job.sent_bytes)
            recoveries.add_metric(values, job.recoveries)
            restarts.add_metric(values, job.restarts)
            commits.add_metric(values, job.commits)
            if job.terminal:
                continue
            step.add_metric(values, job.step)
            epoch.add_metric(values, job.epoch)
            if job.loss is not None:
                loss.add_metric(values, job.loss)
            if job.step_seconds is not None:
                seconds.add_metric(values, job.step_seconds)
        yield from (step, loss, seconds, epoch, sent, recoveries, restarts, commits, checks)


def page(engine: Engine, denied: Mapping[str, int], refused: Mapping[int, int]) -> bytes:
    """The metrics in Prometheus' text format; `denied` counts refused requests by reason, `refused` all by status."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(EngineCollector(engine, denied, refused))
    return generate_latest(registry)
