"""Draws the pictures of docs/concepts.md: an OP-DAG that is cut and placed, the tasks of a pipeline, and a loss that is made up for."""

from __future__ import annotations

import heapq

from draw_overview import STYLE, box, line, marker, text

from dag.cut import Edge, Fragment, Partition
from dag.graph import TensorMeta
from executor.board import TaskBoard
from executor.ordering import Task, TaskKind
from fusion.wire import FrameKind

_MORE = """
  .cut { stroke: #c2410c; stroke-width: 1.6; stroke-dasharray: 4 4; } .arrow { stroke: #5b6775; }
  .fill-arrow { fill: #5b6775; } .task-f { fill: #bcd3f8; } .task-b { fill: #f4c9a8; } .task-u { fill: #b9dfc3; } .task-w { fill: #f6e3a1; }
  .gone { fill: none; stroke: #c2410c; stroke-width: 1.5; stroke-dasharray: 5 4; } .held { fill: #b9dfc3; stroke: #4d9a63; }
  @media (prefers-color-scheme: dark) {
    .cut, .gone { stroke: #f59e6b; } .arrow { stroke: #98a5b3; } .fill-arrow { fill: #98a5b3; }
    .task-f { fill: #2b4a7d; } .task-b { fill: #7a4522; } .task-u { fill: #2d5c3b; } .task-w { fill: #6b5a1e; } .held { fill: #2d5c3b; stroke: #63b37b; }
  }
"""


def _page(width: int, height: int, title: str, parts: list[str]) -> str:
    markers = "".join(marker(kind) for kind in ("arrow", "forward", "back"))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
            f"<title>{title}</title>",
            f"<style>{STYLE}{_MORE}</style><defs>{markers}</defs>",
            box(0.5, 0.5, width - 1, height - 1, "paper", 12),
            *parts,
            "</svg>",
            "",
        ]
    )


def cutting() -> str:
    """Operators in order, two cuts, three fragments, two workers."""
    names = ["embedding", "norm", "linear", "attention", "add", "norm", "linear", "gelu", "linear", "head", "loss"]
    cuts, left, step, y = (3, 7), 46, 76, 74
    parts = [text(24, 34, "OP-DAG: operators in an order in which they can run", "title")]
    for index, name in enumerate(names):
        x = left + step * index
        parts.append(f'<circle cx="{x}" cy="{y}" r="9" class="op"/>')
        parts.append(text(x, y + 28, name, "small", "middle"))
        if index:
            parts.append(line(f"M{x - step + 11} {y}H{x - 12}", "arrow"))
    parts.append(
        line(f"M{left + 6} {y - 8}C{left + 90} {y - 40} {left + 220} {y - 40} {left + step * 4 - 6} {y - 9}", "arrow")
    )
    for position in cuts:
        x = left + step * position - step / 2
        parts.append(f'<path d="M{x} 48V128" class="cut"/>')
        parts.append(text(x, 144, f"cut at {position}", "small", "middle"))
    bounds = [0, *cuts, len(names)]
    parts.append(text(24, 186, "Fragments: contiguous ranges, the unit that is placed, moved and backed up", "title"))
    for index in range(3):
        first, last = bounds[index], bounds[index + 1] - 1
        x, width = left + step * first - 26, step * (last - first) + 52
        parts += [box(x, 202, width, 40, "fragment"), text(x + width / 2, 227, f"fragment {index}", "", "middle")]
        if index:
            parts.append(line(f"M{x - 24} 216H{x - 3}", "forward"))
            parts.append(line(f"M{x - 3} 230H{x - 22}", "back"))
    parts.append(text(24, 288, "Workers: a fragment each, or several", "title"))
    for x, width, name, holds in (
        (20, 300, "worker oslo-1", "fragment 0"),
        (350, 540, "worker lima-1", "fragments 1 and 2"),
    ):
        parts += [
            box(x, 302, width, 44),
            text(x + 14, 329, name, "title"),
            text(x + width - 14, 329, holds, "small", "end"),
        ]
    parts.append(text(20, 376, "Between two workers: activations go forward, once per micro-batch;", "fill-forward"))
    parts.append(text(490, 376, "gradients of the same values come back", "fill-back"))
    return _page(920, 396, "An OP-DAG is cut into fragments, and the fragments are placed on workers", parts)


_SECONDS = {TaskKind.FORWARD: 1.0, TaskKind.BACKWARD: 1.0, TaskKind.WEIGHTS: 1.0, TaskKind.UPDATE: 0.6}
_LETTERS = {TaskKind.FORWARD: "f", TaskKind.BACKWARD: "b", TaskKind.WEIGHTS: "w", TaskKind.UPDATE: "u"}


def _played(fragments: int, micro_batches: int) -> list[tuple[Task, float, float]]:
    """The tasks of one step of 1F1B with (begin, end): what a worker's own board lets run, as soon as it may."""
    meta = TensorMeta((1,), "float32")
    edges = tuple(Edge(i, i, i, i + 1, "activation", meta, gradient=True) for i in range(fragments - 1))
    partition = Partition(
        tuple(range(1, fragments)),
        tuple(
            Fragment(
                *(index, (), (), (), (), (), ()),
                inputs=edges[max(0, index - 1) : index],
                outputs=edges[index : index + 1],
                has_loss=index == fragments - 1,
                postponed=((index, ()),) if index else (),
            )
            for index in range(fragments)
        ),
        edges,
    )
    depths = {"in_flight": range(fragments, 0, -1), "weights_behind": [fragments + 1] * fragments}
    common = {"schedule": "1f1b", "micro_batches": micro_batches, "steps": 1, "clip": False, **depths}
    boards = [TaskBoard(partition, [index], **common) for index in range(fragments)]  # type: ignore[arg-type]
    running: list[tuple[float, int, Task]] = []
    idle, found, now = set(range(fragments)), [], 0.0
    while not all(board.finished for board in boards):
        for index in sorted(idle):
            task = boards[index].next_task()
            if task is not None:
                idle.discard(index)
                # A backward that leaves nothing for later takes as long as both halves.
                whole = task.kind is TaskKind.BACKWARD and not index
                found.append((task, now, now + _SECONDS[task.kind] * (1 + whole)))
                heapq.heappush(running, (found[-1][2], index, task))
        now, index, task = heapq.heappop(running)
        idle.add(index)
        boards[index].completed(task)
        if task.kind is TaskKind.FORWARD and index + 1 < fragments:
            boards[index + 1].arrived(FrameKind.ACTIVATION, index, 1, task.micro_batch)
        elif task.kind is TaskKind.BACKWARD and index:
            boards[index - 1].arrived(FrameKind.GRADIENT, index - 1, 1, task.micro_batch)
    return found


def pipeline() -> str:
    """One step of 1F1B over three fragments, each task as soon as it may run; each half of a backward takes a forward."""
    fragments, micro_batches = 3, 4
    bars = _played(fragments, micro_batches)
    total = max(end for _, _, end in bars)
    left, top, scale, height = 110, 56, 760 / total, 36
    parts = [text(24, 32, "One step: 4 micro-batches over 3 fragments (1F1B)", "title")]
    for index in range(fragments):
        parts.append(text(24, top + index * (height + 12) + 23, f"fragment {index}"))
    for task, begin, end in bars:
        y, style = top + task.fragment * (height + 12), f"task-{_LETTERS[task.kind]}"
        label = task.kind.name[0] + ("" if task.kind is TaskKind.UPDATE else str(task.micro_batch))
        parts.append(
            f'<rect x="{left + begin * scale:.1f}" y="{y}" width="{(end - begin) * scale - 1.5:.1f}" height="{height}" class="{style}"/>'
        )
        parts.append(text(round(left + (begin + end) / 2 * scale, 1), y + 23, label, "small", "middle"))
    idle = 1 - sum(end - begin for _, begin, end in bars) / (fragments * total)
    y = top + fragments * (height + 12) + 16
    parts.append(text(left, y, "F forward, B backward, W gradients of weights that it left, U update;", "small"))
    parts.append(text(left + 470, y, f"what is empty is the bubble: {idle:.0%} here", "small"))
    return _page(900, y + 22, "The tasks of one step over three fragments, with the idle time between them", parts)


def recovery() -> str:
    """A worker is lost; its backup adopts the fragment and replays it from its neighbours' logs."""
    parts = [
        text(24, 34, "Every few steps, snapshots go to backup workers; neighbours keep what they sent since", "title")
    ]
    columns = (("worker a", "fragment 0", 40), ("worker b", "fragment 1", 340), ("worker c", "fragment 2", 640))
    held = ("snapshot of 2 after step 50", "snapshot of 0 after step 50", "snapshot of 1 after step 50")
    for (name, fragment, x), snapshot in zip(columns, held, strict=True):
        parts += [
            box(x, 52, 220, 118),
            text(x + 14, 76, name, "title"),
            box(x + 14, 88, 192, 26, "fragment", 6),
            text(x + 110, 106, f"{fragment}, step 57", "small", "middle"),
            box(x + 14, 120, 192, 20, "held", 6),
            text(x + 110, 134, snapshot, "small", "middle"),
            text(x + 14, 160, "log: sent in steps 51 to 57", "small"),
        ]
    for x in (260, 560):
        parts += [line(f"M{x + 2} 95H{x + 76}", "forward"), line(f"M{x + 78} 107H{x + 5}", "back")]
    parts.append(
        text(
            24,
            214,
            "b is lost: c holds fragment 1 and adopts it; only its steps 51 to 57 run again, from the logs",
            "title",
        )
    )
    parts += [
        box(40, 232, 220, 92),
        text(54, 256, "worker a", "title"),
        box(54, 268, 192, 26, "fragment", 6),
        text(150, 286, "fragment 0, waits in step 58", "small", "middle"),
        text(54, 314, "sends its log again", "small"),
        '<rect x="340" y="232" width="220" height="92" rx="9" class="gone"/>',
        text(450, 283, "worker b is gone", "small", "middle"),
        box(640, 232, 220, 92),
        text(654, 256, "worker c", "title"),
        box(654, 268, 92, 26, "held", 6),
        text(700, 286, "1: 50 → 57", "small", "middle"),
        box(754, 268, 92, 26, "fragment", 6),
        text(800, 286, "2: in 58", "small", "middle"),
        text(654, 314, "its own values are in its log", "small"),
        line("M262 340C360 372 540 372 640 330", "forward"),
    ]
    parts.append(
        text(
            450,
            386,
            "activations of steps 51 to 57, once more: nobody else goes back, and the bits are the same",
            "small",
            "middle",
        )
    )
    return _page(900, 404, "Snapshots on backup workers, and the adoption of a lost worker's fragment", parts)
