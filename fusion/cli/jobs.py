"""`fusion jobs`, `job`, `logs` and `cancel`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fusion.cli.connection import connect
from fusion.cli.options import CaOption, CoordinatorOption, JobIdArgument, JsonOption, TokenOption
from fusion.cli.output import clock, number, out, print_json, show, table
from fusion.units import format_bytes, format_pace, format_seconds

_LONGEST_EVENT = len("checkpoint-copy-failed")


def jobs(
    coordinator: CoordinatorOption = None, token: TokenOption = None, ca: CaOption = None, as_json: JsonOption = False
) -> None:
    """List the jobs of a pool."""
    with connect(coordinator, token, ca) as client:
        found = client.jobs()
    if as_json:
        print_json(found)
    elif not found:
        out("no jobs; submit one with `fusion submit JOB`")
    else:
        rows = [_row(job) for job in found]
        columns = ("id", "name", "state", "step", "loss", "submitted", "reason")
        least = ("submitted", "name", "loss")
        show(table(None, columns, rows, right=("step", "loss"), least=least, folded=("reason",)))


def _row(job: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(job["id"]),
        str(job["name"]),
        str(job["state"]),
        f"{job['step']}/{job['steps']}",
        number(job["loss"]),
        clock(job["submitted_at"]),
        str(job["reason"] or ""),
    )


def job(
    job_id: JobIdArgument,
    timeline: Annotated[
        Path | None,
        typer.Option(
            "--timeline",
            envvar="FUSION_TIMELINE",
            metavar="FILE",
            help="Write the pipeline of the last traced steps as a trace file for Perfetto.",
        ),
    ] = None,
    coordinator: CoordinatorOption = None,
    token: TokenOption = None,
    ca: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one job: state, plan, and where its fragments are."""
    with connect(coordinator, token, ca) as client:
        found = client.job(job_id)
        if timeline is not None:
            from fusion.cli.trace import write_trace

            done = write_trace(client.timeline(job_id), timeline)
    if timeline is not None:
        out(done)
        return
    if as_json:
        print_json(found)
        return
    facts = [
        ("id", str(found["id"])),
        ("name", str(found["name"])),
        ("state", str(found["state"])),
        ("reason", str(found["reason"] or "-")),
        ("submitted", clock(found["submitted_at"])),
        ("started", clock(found["started_at"])),
        ("finished", clock(found["finished_at"])),
        ("step", f"{found['step']} of {found['steps']}"),
        ("loss", f"{number(found['loss'])} (first {number(found['first_loss'])})"),
        ("step time", format_seconds(found["step_seconds"]) if found["step_seconds"] else "-"),
        ("speed", format_pace(found["tokens_per_second"], found.get("samples_per_second"))),
        ("sent", format_bytes(found["sent_bytes"])),
        ("checkpoint", f"step {found['checkpoint']}" if found["checkpoint"] is not None else "-"),
    ]
    checks = found.get("checks") or {}
    if any(checks.values()):
        facts.append(("spot checks", f"{checks['passed']} passed, {checks['failed']} failed, {checks['void']} void"))
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        out(f"{name:<{width}}  {value}")
    if found["fragments"]:
        out("")
        show(plan_table(found))


def plan_table(job: dict[str, Any]) -> Any:
    """The plan of a job: a line for each fragment."""
    rows = []
    for fragment in job["fragments"]:
        first, last = fragment["first_module"] or "-", fragment["last_module"] or "-"
        modules = first if first == last else f"{first} .. {last}"
        rows.append(
            (
                str(fragment["index"]),
                str(fragment["worker"]),
                modules,
                str(fragment["ops"]),
                f"{fragment['parameters']:,}",
                format_bytes(fragment["parameter_bytes"]),
                f"{(fragment['flops'] + fragment.get('backward_flops', 0)) / 1e6:,.1f}",
            )
        )
    work = "MFLOP forward + backward"
    numbers = ("ops", "parameters", "size", work)
    return table(
        None,
        ("fragment", "worker", "modules", *numbers),
        rows,
        right=("fragment", *numbers),
        least=("size", "ops", "parameters"),
        folded=("modules", work),
    )


def logs(
    job_id: JobIdArgument,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", envvar="FUSION_FOLLOW", help="Go on until the job has ended.")
    ] = False,
    coordinator: CoordinatorOption = None,
    token: TokenOption = None,
    ca: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what a job's workers and its coordinator said."""
    with connect(coordinator, token, ca) as client:
        if follow:
            from fusion.follow import follow as items

            for item in items(client, job_id, logs=True):
                if item.kind in ("log", "event"):
                    _print_line(item.data, as_json)
            return
        client.job(job_id)
        lines = [*client.logs(job_id), *client.events(job_id)]
    for line in sorted(lines, key=lambda line: (float(line["time"]), int(line["seq"]))):
        _print_line(line, as_json)


def _print_line(line: dict[str, Any], as_json: bool) -> None:
    if as_json:
        import json

        out(json.dumps(line))
        return
    source = line.get("worker") or line.get("event") or ""
    out(f"{clock(line['time'])}  {source:<{_LONGEST_EVENT}}  {line['message']}")


def cancel(
    job_id: JobIdArgument,
    coordinator: CoordinatorOption = None,
    token: TokenOption = None,
    ca: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Cancel a job that waits or runs."""
    with connect(coordinator, token, ca) as client:
        cancelled = client.cancel(job_id)
    if as_json:
        print_json(cancelled)
    else:
        out(f"job {job_id} {cancelled.get('state', 'cancelled')}")
