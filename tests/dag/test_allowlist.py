"""The allow-list is what its rules give, and holds nothing dangerous."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dag.allowlist import ALLOWED, ALLOWLIST_FILE, ATEN
from dag.generate_allowlist import generate, overloads, refusal
from dag.operators import resolve
from fusion.errors import DagError


def test_the_file_is_what_the_rules_give() -> None:
    assert ALLOWLIST_FILE.read_text() == generate(), "run python -m dag.generate_allowlist and look at the difference"


def test_every_target_resolves() -> None:
    for target in ALLOWED:
        assert callable(resolve(target))


@pytest.mark.parametrize(
    "name",
    [
        "from_file.default",
        "set_.source_Storage",
        "resize_.default",
        "as_strided.default",
        "_unsafe_view.default",
        "nonzero.default",
        "masked_select.default",
        "item.default",
        "_local_scalar_dense.default",
        "empty.memory_format",
        "empty_like.default",
        "new_empty.default",
        "rand.generator",
        "add.out",
        "sparse_coo_tensor.size",
        "quantize_per_tensor.default",
        "mkldnn_convolution.default",
        "_assert_async.msg",
        "convolution_backward.default",
        "native_batch_norm.default",
        "lu_solve.default",
        "record_stream.default",
        "pin_memory.default",
        "linalg_eig.default",
        "istft.default",
        "rename.default",
    ],
)
def test_refused(name: str) -> None:
    known = {found: refusal(found, schema, tags) for found, schema, tags in overloads()}
    # A few go by names that only their out= variants have in the registry.
    assert known.get(name, "unknown") is not None
    with pytest.raises(DagError, match="allow-list"):
        resolve(f"aten.{name}")


@pytest.mark.parametrize("target", ["os.system", "aten.add", "py.eval", "", "aten.add.Tensor.x", "prim.device.default"])
def test_only_listed_names_resolve(target: str) -> None:
    with pytest.raises(DagError, match="allow-list"):
        resolve(target)


def test_no_allowed_operator_takes_a_storage_or_an_output() -> None:
    for target in ATEN:
        schema = resolve(target)._schema  # type: ignore[attr-defined]
        assert not any(argument.is_out for argument in schema.arguments), target
        assert all(isinstance(returned.type, torch._C.TensorType | torch._C.ListType) for returned in schema.returns)


def test_reading_a_dag_needs_no_torch() -> None:
    modules = "dag, dag.graph, dag.cut, dag.serialize, dag.validate, dag.allowlist, dag.evaluation"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
