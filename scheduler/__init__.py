"""Plans: devices and links, cost model, partition policies, simulator. Pure: no sockets, no clocks, no torch."""

from scheduler.compare import compare, simulate_plan
from scheduler.cores import crowded
from scheduler.cost import Costs
from scheduler.devices import (
    SECONDS_OF_COLD_CACHES,
    Device,
    Link,
    Network,
    Processor,
    from_topology,
    homogeneous,
    measured,
)
from scheduler.planner import plan_job
from scheduler.simulation import Simulation, Span
from scheduler.taking_part import Training, plan_for
from scheduler.timeline import chrome_trace, html

__all__ = [
    "SECONDS_OF_COLD_CACHES",
    "Costs",
    "Device",
    "Link",
    "Network",
    "Processor",
    "Simulation",
    "Span",
    "Training",
    "chrome_trace",
    "compare",
    "crowded",
    "from_topology",
    "homogeneous",
    "html",
    "measured",
    "plan_for",
    "plan_job",
    "simulate_plan",
]
