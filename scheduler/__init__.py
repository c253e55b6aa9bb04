"""Plans: devices and links, cost model, partition policies, simulator. Pure: no sockets, no clocks, no torch."""

from scheduler.devices import Device, Link, Network, from_topology, homogeneous
from scheduler.planner import plan_job

__all__ = ["Device", "Link", "Network", "from_topology", "homogeneous", "plan_job"]
