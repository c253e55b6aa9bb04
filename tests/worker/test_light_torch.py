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
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    assert torch.zeros(2, 3).mm(torch.zeros(3, 4)).shape == (2, 4)
assert "torch._dynamo.convert_frame" not in sys.modules, "the compiler was loaded"
import torch._dynamo.utils
assert torch._dynamo.config.cache_size_limit > 0
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
leave_compiler_out()
assert "torch._dynamo.convert_frame" in sys.modules
"""


def test_optimizers_work_without_the_compiler_and_it_can_still_be_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
