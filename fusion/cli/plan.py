"""`fusion plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusion.cli.options import JobArgument, JsonOption
from fusion.cli.output import out, print_json, show

CODECS = ("none", "bf16", "int8", "topk", "adatopk")


def plan(
    job: JobArgument,
    topology: Annotated[
        Path,
        typer.Option("--topology", envvar="FUSION_TOPOLOGY", metavar="FILE", help="Workers and links, a YAML file."),
    ],
    policy: Annotated[
        str | None,
        typer.Option("--policy", envvar="FUSION_POLICY", help="op-fence, equal-ops, equal-compute or random."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", envvar="FUSION_COMPARE", help="Compare the policies and codecs.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Predict a job's plan and step time on a topology, without a pool."""
    from fusion.errors import PlanError, UserError
    from fusion.spec_file import load_spec
    from fusion.topology import load_topology
    from fusion.units import format_seconds
    from fusion.yaml_file import suggest
    from scheduler.policies import POLICIES

    spec = load_spec(job)
    pool = load_topology(topology)
    if policy is not None and policy not in POLICIES:
        raise UserError(f"--policy: no policy {policy!r}{suggest(policy, list(POLICIES))}")
    from fusion.cli.jobs import plan_table
    from fusion.cli.predictions import comparison_table, links_table, predict
    from fusion.submit import capture_job, read_job

    spec, base = read_job(job)
    dag = capture_job(spec, base).dag
    if compare:
        predictions = [predict(dag, spec, pool, policy=name, codec=codec) for name in POLICIES for codec in CODECS]
        if as_json:
            print_json(predictions)
        else:
            show(comparison_table(predictions))
        return
    prediction = predict(dag, spec, pool, policy=policy or spec.plan.policy, codec=spec.compression.codec)
    if "error" in prediction:
        raise PlanError(prediction["error"])
    if as_json:
        print_json(prediction)
        return
    out(
        f"{prediction['policy']}, codec {prediction['codec']}: {format_seconds(prediction['step_seconds'])} per step, "
        f"workers idle {prediction['bubble']:.0%} of it"
    )
    out("")
    show(plan_table(prediction))
    if prediction["bytes_per_link"]:
        out("")
        show(links_table(prediction))
