"""`fusion plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusion.cli.options import JobArgument, JsonOption
from fusion.cli.output import note, out, print_json, show


def plan(
    job: JobArgument,
    topology: Annotated[
        Path,
        typer.Option("--topology", envvar="FUSION_TOPOLOGY", metavar="FILE", help="Workers and links, a YAML file."),
    ],
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            envvar="FUSION_POLICY",
            metavar="POLICY",
            help="op-fence, equal-ops, equal-compute or random. Default: the job's.",
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", envvar="FUSION_COMPARE", help="Compare the policies and codecs.")
    ] = False,
    timeline: Annotated[
        Path | None,
        typer.Option(
            "--timeline",
            envvar="FUSION_TIMELINE",
            metavar="FILE",
            help="Draw the simulated steps: FILE.html is a page, FILE.json a trace for Perfetto. With --compare: of the fastest.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Predict a job's plan and step time, without a pool."""
    from fusion.errors import UserError
    from fusion.spec_file import folder_of, load_spec, placed
    from fusion.topology import load_topology
    from fusion.units import format_seconds, plural
    from fusion.yaml_file import suggest
    from scheduler.policies import POLICIES

    spec = load_spec(job)
    pool = load_topology(topology)
    if policy is not None and policy not in POLICIES:
        raise UserError(f"--policy: no policy {policy!r}{suggest(policy, list(POLICIES))}")
    if spec.plan.workers is not None and spec.plan.workers > len(pool.workers):
        count = len(pool.workers)
        raise UserError(
            f"{job}: plan.workers is {spec.plan.workers}, but {topology} has {count} {plural('worker', count)}; "
            f"the job would wait for {spec.plan.workers}"
        )
    from fusion.cli import predictions
    from fusion.cli.jobs import plan_table
    from fusion.outline import outline_job
    from fusion.spec import CompressionSpec
    from scheduler.compare import codec_name, row, simulate_plan
    from scheduler.compare import compare as comparison
    from scheduler.devices import from_topology
    from scheduler.taking_part import plan_for

    if timeline is not None:
        predictions.check_timeline(timeline)
    with placed(job):
        dag = outline_job(spec, folder_of(job))
    training = predictions.training_of(spec)
    devices, network = from_topology(pool)
    chosen, compression = policy or spec.plan.policy, spec.compression
    if compare:
        policies = tuple(POLICIES) if policy is None else (policy,)
        found = comparison(dag, pool, training, policies=policies, own=compression)
        if as_json:
            print_json(found)
        else:
            show(predictions.comparison_table(found))
            if remark := predictions.remark(found):
                note(remark)
        fastest = min(found, key=lambda prediction: prediction["step_seconds"] or float("inf"))
        chosen = fastest["policy"]
        if fastest["codec"] != codec_name(compression):
            compression = CompressionSpec(codec=fastest["codec"], ratio=training.ratio)
        if timeline is None:
            return
    made = plan_for(dag, devices, network, training, chosen, compression)
    played = simulate_plan(dag, made, devices, network, training)
    if timeline is not None:
        predictions.write_timeline(timeline, played, f"{spec.name}: {chosen}, codec {codec_name(compression)}")
    if compare:
        return
    prediction = row(chosen, codec_name(compression), dag, made, played) | {
        "fragments": predictions.fragments(dag, made)
    }
    if as_json:
        print_json(prediction)
        return
    out(
        f"{chosen}, codec {codec_name(compression)}: {format_seconds(played.step_seconds)} per step, "
        f"workers idle {played.bubble:.0%} of it"
    )
    out("")
    show(plan_table(prediction))
    out("")
    show(predictions.memory_table(prediction))
    if prediction["bytes_per_link"]:
        out("")
        show(predictions.links_table(prediction))
