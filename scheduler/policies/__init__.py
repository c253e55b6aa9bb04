"""Partition policies: functions from a request to cuts and a placement."""

from __future__ import annotations

from scheduler.policies.base import Policy, Request
from scheduler.policies.chance import random_cuts
from scheduler.policies.equal import equal_compute, equal_ops
from scheduler.policies.op_fence import op_fence

POLICIES: dict[str, Policy] = {
    "op-fence": op_fence,
    "equal-ops": equal_ops,
    "equal-compute": equal_compute,
    "random": random_cuts,
}

__all__ = ["POLICIES", "Policy", "Request"]
