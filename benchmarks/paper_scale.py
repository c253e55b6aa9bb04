"""The papers' scale, on paper: GPT-2 XL and ResNet-101 over 48 GPUs in three clusters, and over 1,000 consumer devices.

`python benchmarks/paper_scale.py`. Nothing is trained and nothing measured but the time of planning: step times are simulated, for
the topologies in `examples/paper_scale`. Speed-ups are over the faster one of equal-ops and equal-compute without a codec, in
the order of the file (cluster by cluster, which favours them). OP-Fence plans twice: free to leave workers out, and with all.

One command of `fusion plan JOB --topology FILE --compare` shows a model and topology with every policy and codec.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, machine, peak_memory, report
from dag.graph import OpDag
from fusion.cli.predictions import training_of
from fusion.outline import outline_job
from fusion.spec import CompressionSpec, JobSpec
from fusion.submit import read_job
from fusion.topology import load_topology
from fusion.units import format_seconds
from scheduler import Training
from scheduler.compare import CodecName, describe
from scheduler.devices import from_topology

EXAMPLES = ROOT / "examples" / "paper_scale"
MODELS = {
    "GPT-2 XL": ("gpt2_xl.yaml", {}),
    "GPT-2 XL, head of its own": ("gpt2_xl.yaml", {"tied": False}),
    "ResNet-101": ("resnet101.yaml", {}),
}
"""Job specs, and other arguments for their models: a tied embedding costs the baselines its gradient for each micro-batch."""
TOPOLOGIES = {"48 GPUs": "three_clusters.yaml", "1,000 devices": "thousand_devices.yaml"}
UNIFORM: tuple[CodecName, ...] = ("none", "topk")
ADAPTIVE: tuple[CodecName, ...] = ("none", "int8", "topk", "adatopk", "auto")
REPORTED = (1.45, 9.39)
"""What FusionLLM's abstract reports over its baselines (arXiv 2410.12707)."""


@dataclass(frozen=True)
class Variant:
    """One family of rows."""

    policy: str
    codecs: tuple[CodecName, ...]
    everyone: bool
    """Whether each worker gets a fragment."""


VARIANTS = {
    "48 GPUs": (
        Variant("equal-ops", UNIFORM, True),
        Variant("equal-compute", UNIFORM, True),
        Variant("op-fence", ADAPTIVE, False),
        Variant("op-fence", ADAPTIVE, True),
    ),
    # A pipeline over all 1,000 gains nothing; one baseline is enough to see it.
    "1,000 devices": (Variant("equal-compute", ("none",), True), Variant("op-fence", ADAPTIVE, False)),
}


def job(model: str) -> tuple[JobSpec, Path]:
    """The job of one model."""
    file, changes = MODELS[model]
    spec, base = read_job(EXAMPLES / file)
    made = spec.model.model_copy(update={"args": {**getattr(spec.model, "args", {}), **changes}})
    return spec.model_copy(update={"model": made}), base


def rows_of(dag: OpDag, training: Training, model: str, pool: str) -> list[dict[str, Any]]:
    """Every variant of one model on one topology."""
    devices, network = from_topology(load_topology(EXAMPLES / TOPOLOGIES[pool]))
    regions = {device.name: device.region for device in devices}
    found: list[dict[str, Any]] = []
    for variant in VARIANTS[pool]:
        for codec in variant.codecs:
            begun = time.process_time()
            settings = replace(training, workers=len(devices) if variant.everyone else None)
            compression = CompressionSpec(codec=codec, ratio=settings.ratio)
            row: dict[str, Any] = describe(dag, devices, network, settings, variant.policy, compression)
            found.append(
                {"model": model, "topology": pool, "everyone": variant.everyone}
                | {key: row[key] for key in ("policy", "codec", "step_seconds", "bubble", "wire_ratio", "reason")}
                | {"simulated_steps": row["simulated_steps"], "fragments": len(row["placement"])}
                | {"workers": len(set(row["placement"])), "regions": len({regions[name] for name in row["placement"]})}
                | {"sent_bytes": sum(row["bytes_per_link"].values())}
                | {"largest_memory": max(row["memory_per_worker"].values(), default=None)}
                | {"seconds_to_plan": round(time.process_time() - begun, 2)}
            )
            print(".", end="", file=sys.stderr, flush=True)
    usual = [row["step_seconds"] for row in found if row["policy"] != "op-fence" and row["codec"] == "none"]
    baseline = min((seconds for seconds in usual if seconds), default=None)
    for each in found:
        each["speedup"] = baseline / each["step_seconds"] if baseline and each["step_seconds"] else None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), help="only this one")
    options = parser.parse_args()
    about = machine()
    found: list[dict[str, Any]] = []
    captures = {}
    for model in MODELS if options.model is None else [options.model]:
        spec, base = job(model)
        begun = time.process_time()
        dag = outline_job(spec, base)
        captures[model] = {
            "parameters": sum(dag.ops[parameter.op].output_bytes for parameter in dag.parameters) // 4,
            "operators": len(dag.ops),
            "seconds": round(time.process_time() - begun, 1),
            "peak_memory_mib": round(peak_memory() / 2**20),
        }
        for pool in TOPOLOGIES:
            found += rows_of(dag, training_of(spec), model, pool)
    print(file=sys.stderr)
    report(
        "paper_scale",
        "Simulated step times; speed-up over the faster dense baseline",
        ["model, topology", "plan", "codec", "step", "speed-up", "workers", "idle", "planned and simulated in"],
        [_line(row) for row in found],
        {"machine": about, "reported_by_the_paper": REPORTED, "captures": captures, "rows": found},
    )


def _line(row: dict[str, Any]) -> list[str]:
    plan = row["policy"] + (", all workers" if row["everyone"] else "")
    name = [f"{row['model']}, {row['topology']}", plan, row["codec"]]
    if row["reason"]:
        return [*name, row["reason"], "", "", "", ""]
    return [
        *name,
        format_seconds(row["step_seconds"]),
        f"{row['speedup']:.2f}" if row["speedup"] else "",
        str(row["workers"]),
        f"{row['bubble']:.0%}",
        format_seconds(row["seconds_to_plan"]),
    ]


if __name__ == "__main__":
    main()
