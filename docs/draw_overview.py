"""Draws docs/overview.svg: client, coordinator, four workers with their fragments, and what travels between them."""

from __future__ import annotations

from pathlib import Path

STYLE = """
  text { font: 14px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #16202c; }
  .title { font-weight: 600; } .small { font-size: 12px; fill: #5b6775; }
  .paper { fill: #fbfcfd; stroke: #cfd6de; } .box { fill: #ffffff; stroke: #8d99a7; stroke-width: 1.3; }
  .fragment { fill: #eaf1fd; stroke: #7ea4e4; } .op { fill: #3b74d8; }
  .control { stroke: #8d99a7; stroke-dasharray: 5 4; } .forward { stroke: #1d5fd0; } .back { stroke: #c2410c; }
  .line { fill: none; stroke-width: 1.8; }
  .fill-control { fill: #8d99a7; } .fill-forward { fill: #1d5fd0; } .fill-back { fill: #c2410c; }
  text.fill-forward { fill: #1d5fd0; } text.fill-back { fill: #c2410c; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e5ebf2; } .small { fill: #98a5b3; }
    .paper { fill: #10151b; stroke: #34404d; } .box { fill: #1a222c; stroke: #6f7d8c; }
    .fragment { fill: #1c2c47; stroke: #4b76bd; } .op { fill: #7db0ff; }
    .forward { stroke: #7db0ff; } .back { stroke: #f59e6b; } .fill-forward { fill: #7db0ff; } .fill-back { fill: #f59e6b; }
    text.fill-forward { fill: #7db0ff; } text.fill-back { fill: #f59e6b; }
  }
"""
WIDTH, HEIGHT = 900, 470
LEFT, STEP, TOP, BOX_WIDTH, BOX_HEIGHT = 40, 212, 270, 180, 140


def text(x: float, y: float, content: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" class="{style}" text-anchor="{anchor}">{content}</text>'


def box(x: float, y: float, width: float, height: float, style: str = "box", radius: int = 9) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" class="{style}"/>'


def line(path: str, kind: str, both: bool = False) -> str:
    start = f' marker-start="url(#{kind})"' if both else ""
    return f'<path d="{path}" class="line {kind}" marker-end="url(#{kind})"{start}/>'


def marker(kind: str) -> str:
    return (
        f'<marker id="{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0.6L8 4L0 7.4z" class="fill-{kind}"/></marker>'
    )


def worker(index: int, name: str) -> list[str]:
    x = LEFT + STEP * index
    parts = [box(x, TOP, BOX_WIDTH, BOX_HEIGHT), text(x + 12, TOP + 22, name, "title")]
    parts.append(box(x + 12, TOP + 34, BOX_WIDTH - 24, 62, "fragment", 7))
    for dot in range(5):
        parts.append(f'<circle cx="{x + 30 + dot * 30}" cy="{TOP + 56}" r="5" class="op"/>')
    parts.append(text(x + BOX_WIDTH / 2, TOP + 86, f"fragment {index}", "small", "middle"))
    last = "loss, optimizer" if index == 3 else "optimizer of its parameters"
    parts.append(text(x + BOX_WIDTH / 2, TOP + 117, last, "small", "middle"))
    feeds = {0: "reads inputs", 3: "reads targets"}.get(index, "")
    parts.append(text(x + BOX_WIDTH / 2, TOP + 133, feeds, "small", "middle"))
    return parts


def picture() -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">',
        "<title>A client submits a captured model to the coordinator; workers train its fragments</title>",
        f"<style>{STYLE}</style><defs>{''.join(marker(kind) for kind in ('control', 'forward', 'back'))}</defs>",
        box(0.5, 0.5, WIDTH - 1, HEIGHT - 1, "paper", 12),
        box(40, 40, 260, 122),
        text(56, 64, "fusion submit job.yaml", "title"),
        text(56, 88, "loads your model, runs torch.export", "small"),
        text(56, 108, "OP-DAG (data, no code)", "small"),
        text(56, 128, "weights (safetensors)", "small"),
        text(56, 148, "arrays of the data", "small"),
        box(470, 40, 390, 122),
        text(486, 64, "coordinator", "title"),
        text(486, 88, "checks the OP-DAG, keeps blobs by their hash", "small"),
        text(486, 108, "scheduler: cuts the OP-DAG, places the fragments", "small"),
        text(486, 128, "job queue, checkpoints, metrics, dashboard", "small"),
        text(486, 148, "not on the hot path; never loads torch", "small"),
        line("M300 101H466", "control"),
        text(383, 92, "HTTP", "small", "middle"),
    ]
    for index, name in enumerate(("worker 1", "worker 2", "worker 3", "worker 4")):
        parts += worker(index, name)
        x = LEFT + STEP * index + BOX_WIDTH / 2
        parts.append(line(f"M{x} 238V{TOP - 4}", "control"))
    parts.append('<path d="M130 238H766" class="line control"/>')
    parts.append(line("M665 238V166", "control"))
    parts.append(text(130, 206, "plan, start, stop; heartbeats, step reports (ZeroMQ, CURVE)", "small"))
    parts.append(text(130, 225, "each worker fetches its fragments' weights and data (HTTP)", "small"))
    for index in range(3):
        left, right = LEFT + STEP * index + BOX_WIDTH, LEFT + STEP * (index + 1)
        parts.append(line(f"M{left + 1} {TOP + 56}H{right - 3}", "forward"))
        parts.append(line(f"M{right - 1} {TOP + 78}H{left + 3}", "back"))
    parts.append('<path d="M40 440h34" class="line forward" marker-end="url(#forward)"/>')
    parts.append(text(84, 445, "activations, once per micro-batch", "fill-forward"))
    parts.append('<path d="M380 440h-34" class="line back" marker-end="url(#back)"/>')
    parts.append(text(390, 445, "gradients of the same values, back", "fill-back"))
    parts.append(text(860, 445, "worker to worker: ZeroMQ, CURVE", "small", "end"))
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    (Path(__file__).parent / "overview.svg").write_text(picture())
