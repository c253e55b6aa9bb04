"""`fusion plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusion.cli.options import JobArgument, JsonOption
from fusion.cli.output import print_json, show


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
    from fusion.errors import UserError
    from fusion.spec_file import load_spec
    from fusion.topology import load_topology
    from fusion.yaml_file import suggest
    from scheduler.policies import POLICIES

    spec = load_spec(job)
    pool = load_topology(topology)
    if policy is not None and policy not in POLICIES:
        raise UserError(f"--policy: no policy {policy!r}{suggest(policy, list(POLICIES))}")
    from fusion.plan_report import predict, prediction_table
    from fusion.submit import capture_job, read_job

    spec, base = read_job(job)
    dag = capture_job(spec, base).dag
    policies = list(POLICIES) if compare else [policy or spec.plan.policy]
    codecs = ["none", "bf16", "int8", "topk", "adatopk"] if compare else [spec.compression.codec]
    predictions = [predict(dag, spec, pool, policy=name, codec=codec) for name in policies for codec in codecs]
    if as_json:
        print_json(predictions if compare else predictions[0])
    else:
        show(prediction_table(predictions))
