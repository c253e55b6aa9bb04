"""Draws the pictures of docs/concepts.md: an OP-DAG that is cut and placed, the tasks of a pipeline, and a loss that is made up for."""

from __future__ import annotations

from draw_overview import STYLE, box, line, marker, text

from executor.ordering import TaskKind, passes

_MORE = """
  .cut { stroke: #c2410c; stroke-width: 1.6; stroke-dasharray: 4 4; } .arrow { stroke: #5b6775; }
  .fill-arrow { fill: #5b6775; } .task-f { fill: #bcd3f8; } .task-b { fill: #f4c9a8; } .task-u { fill: #b9dfc3; }
  .gone { fill: none; stroke: #c2410c; stroke-width: 1.5; stroke-dasharray: 5 4; } .held { fill: #b9dfc3; stroke: #4d9a63; }
  @media (prefers-color-scheme: dark) {
    .cut, .gone { stroke: #f59e6b; } .arrow { stroke: #98a5b3; } .fill-arrow { fill: #98a5b3; }
    .task-f { fill: #2b4a7d; } .task-b { fill: #7a4522; } .task-u { fill: #2d5c3b; } .held { fill: #2d5c3b; stroke: #63b37b; }
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


def pipeline() -> str:
    """One step of 1F1B over three fragments, each task as soon as its inputs are there; a backward takes two forwards."""
    fragments, micro_batches, forward, backward = 3, 4, 1.0, 2.0
    orders = [list(passes("1f1b", micro_batches, fragments - index)) for index in range(fragments)]
    ended: dict[tuple[TaskKind, int, int], float] = {}
    free = [0.0] * fragments
    bars: list[tuple[int, TaskKind, int, float, float]] = []
    while any(orders):
        for index, order in enumerate(orders):
            if not order:
                continue
            kind, micro_batch = order[0]
            before = index - 1 if kind is TaskKind.FORWARD else index + 1
            needed = (kind, before, micro_batch)
            if 0 <= before < fragments and needed not in ended:
                continue
            begin = max(free[index], ended.get(needed, 0.0))
            end = begin + (forward if kind is TaskKind.FORWARD else backward)
            ended[kind, index, micro_batch] = free[index] = end
            bars.append((index, kind, micro_batch, begin, end))
            order.pop(0)
    total = max(free) + 0.6
    left, top, scale, height = 110, 56, 760 / total, 36
    parts = [text(24, 32, "One step: 4 micro-batches over 3 fragments (1F1B)", "title")]
    for index in range(fragments):
        y = top + index * (height + 12)
        parts.append(text(24, y + 23, f"fragment {index}"))
        begin = free[index]
        parts.append(
            f'<rect x="{left + begin * scale:.1f}" y="{y}" width="{0.6 * scale:.1f}" height="{height}" class="task-u"/>'
        )
        parts.append(text(left + (begin + 0.3) * scale, y + 23, "U", "small", "middle"))
    for index, kind, micro_batch, begin, end in bars:
        y, style = top + index * (height + 12), "task-f" if kind is TaskKind.FORWARD else "task-b"
        letter = "F" if kind is TaskKind.FORWARD else "B"
        parts.append(
            f'<rect x="{left + begin * scale:.1f}" y="{y}" width="{(end - begin) * scale - 1.5:.1f}" height="{height}" class="{style}"/>'
        )
        parts.append(
            text(round(left + (begin + end) / 2 * scale, 1), y + 23, f"{letter}{micro_batch}", "small", "middle")
        )
    idle = 1 - sum(end - begin for _, _, _, begin, end in bars) / (fragments * max(free))
    y = top + fragments * (height + 12) + 16
    parts.append(text(left, y, "F forward, B backward (in micro-batch order), U update;", "small"))
    parts.append(text(left + 370, y, f"what is empty is the bubble: {idle:.0%} here", "small"))
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
