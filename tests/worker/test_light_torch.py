"""Workers do without torch's compiler, until somebody really asks for it."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import torch
from worker.machine.light_torch import leave_compiler_out
leave_compiler_out()
for name in ("SGD", "Adam", "AdamW", "Adagrad", "Muon"):
    parameter = torch.nn.Parameter(torch.zeros(3, 3))
    optimizer = getattr(torch.optim, name)([parameter], lr=0.1)
    parameter.grad = torch.ones(3, 3)
    optimizer.step()
    optimizer.zero_grad()
assert "sympy" not in sys.modules, "the compiler was loaded"
import torch._dynamo.config
assert torch._dynamo.config.cache_size_limit > 0
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
leave_compiler_out()
assert "sympy" in sys.modules
"""


def test_optimizers_work_without_the_compiler_and_it_can_still_be_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
