"""`fusion up`: one machine, one command."""

from __future__ import annotations

from contextlib import closing
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fusion.cli.options import MetricsOption, TensorBoardOption, port_option
from fusion.cli.output import out, show
from fusion.remote_files import is_url

if TYPE_CHECKING:
    from fusion.client import StreamItem
    from fusion.local import LocalWorker
    from fusion.run_view import RunView
    from fusion.runs import Run
    from fusion.spec import JobSpec
    from fusion.topology import Topology

DEFAULT_WORKERS = 4


def up(
    job: Annotated[
        Path | None, typer.Argument(metavar="JOB", help="The job spec, a YAML file. Default: a built-in example.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", envvar="FUSION_WORKERS", min=1, metavar="N", help="Worker processes. Default: 4."),
    ] = None,
    topology: Annotated[
        Path | None,
        typer.Option(
            "--topology",
            envvar="FUSION_TOPOLOGY",
            metavar="FILE",
            help="Workers and links to act out: a YAML file. Links and workers are slowed down to it.",
        ),
    ] = None,
    metrics: MetricsOption = None,
    tensorboard: TensorBoardOption = None,
    no_dashboard: Annotated[
        bool, typer.Option("--no-dashboard", envvar="FUSION_NO_DASHBOARD", help="Serve the API only.")
    ] = False,
    port: Annotated[
        int,
        port_option("--port", "HTTP port. Default: a free one."),
    ] = 0,
    threads: Annotated[
        int,
        typer.Option("--threads", envvar="FUSION_THREADS", min=1, metavar="N", help="Compute threads of each worker."),
    ] = 1,
    chaos: Annotated[
        bool,
        typer.Option(
            "--chaos", envvar="FUSION_CHAOS", help="Kill a worker at random now and then, and see the job get over it."
        ),
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume", envvar="FUSION_RESUME", metavar="PATH", help="A checkpoint's folder or file, here or at a URL."
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state", envvar="FUSION_STATE", metavar="DIR", help="The run's folder. Default: fusion-runs/NAME-TIME."
        ),
    ] = None,
) -> None:
    """Train on this machine alone. Starts a coordinator, workers and a job, and shows progress until it has ended."""
    from fusion.chaos import Chaos
    from fusion.demo import write_demo
    from fusion.errors import UserError
    from fusion.local import LocalPool
    from fusion.metrics_file import MetricsFile
    from fusion.run_view import RunView
    from fusion.runs import run_folder, train_on
    from fusion.spec_file import folder_of, load_spec, placed
    from fusion.tensorboard import TensorBoardFile
    from fusion.topology import load_topology
    from fusion.units import plural

    spec = load_spec(job) if job is not None else None
    if chaos and workers == 1:
        raise UserError("--chaos needs at least two workers: somebody has to take over; leave out --workers 1")
    if resume is not None and not is_url(resume) and not Path(resume).exists():
        raise UserError(f"--resume {resume}: no such file or folder")
    pool_on_paper = load_topology(topology) if topology is not None else None
    if pool_on_paper is not None and workers is not None and workers != len(pool_on_paper.workers):
        raise UserError(f"--workers {workers}: the topology has {len(pool_on_paper.workers)}; leave out --workers")
    folder = run_folder(spec.name if spec is not None else "demo-gpt", state)
    path = job if job is not None else write_demo(folder / "job")
    spec = spec or load_spec(path)
    team = _team(pool_on_paper, workers or spec.plan.workers or DEFAULT_WORKERS, threads)
    if spec.plan.workers is not None and spec.plan.workers > len(team):
        raise UserError(
            f"{path}: plan.workers is {spec.plan.workers}, but {len(team)} are started; "
            f"give --workers {spec.plan.workers}, or leave out plan.workers"
        )
    if spec.plan.workers is None and pool_on_paper is None:
        # On one machine all workers are alike: use every one that was asked for. On a topology the policy decides.
        spec = spec.model_copy(update={"plan": spec.plan.model_copy(update={"workers": len(team)})})

    with (
        closing(MetricsFile(metrics)) as file,
        closing(TensorBoardFile(tensorboard)) as board,
        RunView(spec.name, spec.train.steps) as view,
    ):
        steps = f"{spec.train.steps} {plural('step', spec.train.steps)}"
        view.say(f"{spec.name}: {steps} on {len(team)} {plural('worker', len(team))}, in {folder}")
        if pool_on_paper is not None:
            view.say(f"links between workers, and workers beside the fastest, are as slow as {topology} says")
        view.status("starting the coordinator and the workers")
        pool = LocalPool(folder, team, port=port, dashboard=not no_dashboard, topology=topology)
        with pool:
            if not no_dashboard:
                view.say(f"dashboard: {pool.url}/")

            # Torch takes a second to import: the workers start meanwhile.
            from fusion.submit import CapturedJob, capture_job

            def capture() -> CapturedJob:
                with placed(path):
                    return capture_job(spec, folder_of(path), say=view.status)

            disturb = Chaos(pool, spec.train.steps, view.say).heard if chaos else None

            def show_item(item: StreamItem) -> None:
                file.write(item)
                board.write(item)
                view.show(item)
                if disturb is not None:
                    disturb(item)

            try:
                run = train_on(
                    pool,
                    capture,
                    show=show_item,
                    say=view.status,
                    remark=view.say,
                    resume=resume if resume is None or is_url(resume) else str(Path(resume).resolve()),
                )
            except KeyboardInterrupt:
                view.say(f"stopping; what there is stays in {folder}")
                raise
    _summary(spec, run, view, metrics)


def _team(topology: Topology | None, count: int, threads: int) -> list[LocalWorker]:
    from fusion.local import LocalWorker

    if topology is None:
        return [LocalWorker(f"worker-{index + 1}", threads) for index in range(count)]
    return [LocalWorker(worker.name, threads, worker.memory) for worker in topology.workers]


def _summary(spec: JobSpec, run: Run, view: RunView, metrics: Path | None) -> None:
    from fusion.cli.jobs import plan_table
    from fusion.run_view import loss_text
    from fusion.units import format_bytes, format_seconds, plural

    history, fragments = view.history, run.job["fragments"]
    parameters = sum(fragment["parameters"] for fragment in fragments)
    out("")
    steps = f"{run.job['step']} {plural('step', run.job['step'])}"
    out(f"{spec.name} is trained: {steps} in {format_seconds(run.seconds)}, {history.rate}")
    if history.losses:
        after = loss_text(history.losses[-1]) if isfinite(history.losses[-1]) else "no number"
        out(f"  loss        {loss_text(history.losses[0])} before, {after} after")
    if history.evaluations:
        out(f"  held out    {loss_text(history.evaluations[-1][1])} (loss on data that was not trained on)")
    sent = format_bytes(history.sent_bytes)
    workers = len(run.job["workers"])
    out(f"  traffic     {sent} between {workers} {plural('worker', workers)}")
    out(f"  model       {parameters:,} parameters in {len(fragments)} {plural('fragment', len(fragments))}")
    out(f"  checkpoint  {run.checkpoint / 'model.safetensors'}")
    if metrics is not None:
        out(f"  metrics     {metrics}")
    out("")
    show(plan_table(run.job))
