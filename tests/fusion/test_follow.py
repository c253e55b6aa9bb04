"""Following a job: everything once and in order, across broken connections."""

from __future__ import annotations

import json
from contextlib import closing

import pytest

from fusion.client import StreamItem
from fusion.errors import UnreachableError, UserError
from fusion.follow import follow
from fusion.metrics_file import MetricsFile

RUNNING, DONE = StreamItem("job", {"state": "running"}), StreamItem("job", {"state": "done"})


def metric(step: int) -> StreamItem:
    return StreamItem("metrics", {"step": step, "loss": 1.0 / step, "eval_loss": None})


def event(seq: int) -> StreamItem:
    return StreamItem("event", {"seq": seq, "event": "checkpoint", "message": "kept"})


class FakeClient:
    """Streams of items; an exception among them breaks that connection."""

    def __init__(self, *streams: list[StreamItem | Exception], late: list[StreamItem] | None = None) -> None:
        self.streams = list(streams)
        self.late = late or []
        self.asked: list[tuple[int, int]] = []

    def stream(self, job, *, after_step, after_event, after_log):
        self.asked.append((after_step, after_event))
        items = self.streams.pop(0)
        if items and isinstance(items[0], Exception):
            raise items[0]
        return self._give(items)

    def _give(self, items):
        for item in items:
            if isinstance(item, Exception):
                raise item
            yield item

    def metrics(self, job, after):
        return [item.data for item in self.late if item.kind == "metrics" and item.data["step"] > after]

    def events(self, job, after):
        return [item.data for item in self.late if item.kind == "event" and item.data["seq"] > after]


def run(client: FakeClient, **options) -> tuple[list[StreamItem], list[float]]:
    pauses: list[float] = []
    return list(follow(client, "a", pause=pauses.append, **options)), pauses


def test_a_plain_run():
    items, pauses = run(FakeClient([RUNNING, metric(1), event(1), metric(2), DONE]))
    assert items == [RUNNING, metric(1), event(1), metric(2), DONE]
    assert pauses == []


def test_overlaps_are_dropped_and_broken_streams_resumed():
    client = FakeClient(
        [RUNNING, metric(1), event(3), UnreachableError("gone")],
        [UnreachableError("still gone")],
        [RUNNING, metric(1), metric(2), event(3), event(4)],
        [metric(3), DONE],
        late=[metric(3), metric(4), event(5)],
    )
    items, pauses = run(client)
    assert [item.data["step"] for item in items if item.kind == "metrics"] == [1, 2, 3, 4]
    assert [item.data["seq"] for item in items if item.kind == "event"] == [3, 4, 5]
    assert items[-1] == DONE
    assert client.asked == [(0, 0), (1, 3), (1, 3), (2, 4)]
    assert pauses == [0.2, 0.4, 0.2]


def test_a_job_that_has_ended_before():
    items, _ = run(FakeClient([DONE, metric(1), event(1)]))
    assert items == [metric(1), event(1), DONE]


def test_giving_up():
    with pytest.raises(UnreachableError, match="gone"):
        run(FakeClient([UnreachableError("gone")], [UnreachableError("gone")]), give_up_seconds=-1)


def test_a_full_disk_is_what_a_metrics_file_tells():
    """Closing it tries again to write what is left, and must not hide that."""
    with (
        pytest.raises(UserError, match="--metrics /dev/full: can't be written: No space left on device"),
        closing(MetricsFile("/dev/full")) as file,
    ):
        file.write(metric(1))


def test_metrics_file(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    with closing(MetricsFile(path)) as file:
        for item in (RUNNING, metric(1), event(1), StreamItem("metrics", {"step": 2, "loss": None})):
            file.write(item)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 1.0},
        {"seq": 1, "event": "checkpoint", "message": "kept"},
        {"step": 2, "loss": None},
    ]
