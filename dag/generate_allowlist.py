"""Makes `allowlist.txt` from torch's operator registry: `python -m dag.generate_allowlist`.

An ATen overload is allowed unless a rule below refuses it. Workers run whatever a DAG asks for, so the rules leave only
functions from tensors and plain values to tensors of shapes that can be known before running: no I/O, no view of memory
that the arguments do not own, no uninitialised memory, no value that leaves the tensor world.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dag.allowlist import ALLOWLIST_FILE

REFUSED_TAGS: dict[str, str] = {
    "out": "`out=` variants write where the caller says",
    "out_variant": "`out=` variants write where the caller says",
    "dynamic_output_shape": "the output's shape depends on values, so it can't be checked before running",
    "data_dependent_output": "it takes a value out of a tensor",
    "inplace_view": "it changes a tensor's metadata in place",
}

REFUSED_NAMES: dict[str, str] = {
    name: reason
    for reason, names in {
        "reads or writes files or other memory": "from_file record_stream pin_memory is_pinned",
        "reaches into storage or metadata": (
            "set_ set set_data data as_strided as_strided_ as_strided_copy as_strided_scatter resize resize_ resize_as "
            "resize_as_ resize_as_sparse resize_as_sparse_ swapdims_ swapaxes_ rename rename_ align_to align_as "
            "align_tensors refine_names output_nr is_leaf retain_grad retains_grad requires_grad_ detach_ lift "
            "lift_fresh lift_fresh_copy alias_copy copy_sparse_to_sparse sym_size sym_numel sym_stride"
        ),
        "gives uninitialised memory": (
            "empty empty_like empty_strided empty_permuted empty_quantized new_empty new_empty_strided"
        ),
        "gives a shape that depends on values": (
            "nonzero nonzero_numpy nonzero_static argwhere masked_select unique_consecutive unique_dim bincount "
            "where.default histogramdd combinations"
        ),
        "takes a value out of a tensor": "item is_nonzero equal allclose",
        "trusts index values and may read or write past the end": (
            "lu_solve linalg_lu_solve linalg_ldl_solve linalg_ldl_factor linalg_ldl_factor_ex lu_unpack ctc_loss "
            "segment_reduce fractional_max_pool2d fractional_max_pool3d lstm.data gru.data rnn_tanh.data rnn_relu.data"
        ),
        "writes its arguments without saying so, use batch_norm": (
            "native_batch_norm batch_norm_stats batch_norm_elemt batch_norm_gather_stats "
            "batch_norm_gather_stats_with_counts batch_norm_update_stats batch_norm_backward_reduce "
            "batch_norm_backward_elemt"
        ),
        "renormalises a parameter in place": "embedding_renorm_ embedding_renorm",
        "gives complex numbers of another precision": "cdouble chalf",
        "gives complex numbers in no certain order or phase": "linalg_eig linalg_eigvals",
        "looks at values": "istft",
        "is an implementation detail or a stub": (
            "convolution_overrideable choose_qparams_optimized alias to_padded_tensor hspmm sspaddmm smm native_norm "
            "values indices slice_inverse hash_tensor linalg__powsum flatten_dense_tensors unflatten_dense_tensors "
            "view.dtype normal_functional rrelu_with_noise_functional"
        ),
    }.items()
    for name in names.split()
}

REFUSED_PARTS: dict[str, str] = {
    "backward": "gradients come from autograd; backward kernels trust their arguments",
    "sparse": "sparse layouts are not supported",
    "coo": "sparse layouts are not supported",
    "csr": "sparse layouts are not supported",
    "csc": "sparse layouts are not supported",
    "ccol": "sparse layouts are not supported",
    "crow": "sparse layouts are not supported",
    "coalesce": "sparse layouts are not supported",
    "to_dense": "sparse layouts are not supported",
    "row_indices": "sparse layouts are not supported",
    "col_indices": "sparse layouts are not supported",
    "quant": "quantised tensors are not supported",
    "q_": "quantised tensors are not supported",
    "fbgemm": "quantised tensors are not supported",
    "mkldnn": "back-end detail",
    "cudnn": "back-end detail",
    "miopen": "back-end detail",
    "mps": "back-end detail",
    "nested": "nested tensors are not supported",
    "slow_": "back-end detail",
    "thnn": "back-end detail",
    "unsafe": "skips checks",
    "_jvp": "forward-mode differentiation is not used",
    "storage": "reaches into storage",
}

NOT_QUANTISED = frozenset({"quantile", "nanquantile"})

ALLOWED_PRIVATE = frozenset(
    {
        "_weight_norm",
        "_upsample_nearest_exact1d",
        "_upsample_nearest_exact2d",
        "_upsample_nearest_exact3d",
        "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa",
        "__and__",
        "__or__",
        "__xor__",
        "__lshift__",
        "__rshift__",
        "_conj",
        "_neg_view",
        "_sample_dirichlet",
        "_standard_gamma",
    }
)
"""Private operators that public functions call at the composite level."""

ALLOWED_TYPES = frozenset(
    {
        "Tensor",
        "int",
        "bool",
        "float",
        "number",
        "List[int]",
        "List[bool]",
        "List[float]",
        "List[number]",
        "List[Tensor]",
        "List[Optional[Tensor]]",
        "Device",
        "Generator",
    }
)
"""Types an argument may have, also as `Optional`. A generator can only be left out: a DAG can't express one."""

SHAPE_KNOWN_BY_ARGUMENTS = frozenset({"index.Tensor", "repeat_interleave.Tensor", "one_hot.default"})
"""Tagged as of dynamic shape, but static with integer indices, with output_size, with num_classes; `check_shapes` refuses
the other uses."""

INERT_STRINGS = frozenset(
    {
        "approximate",
        "driver",
        "equation",
        "indexing",
        "interpolation",
        "mode",
        "norm",
        "ord",
        "p",
        "padding",
        "pad_mode",
        "padding_side",
        "reduce",
        "rounding_mode",
        "side",
        "UPLO",
    }
)
"""String arguments that only choose between formulas."""


def refusal(name: str, schema: Any, tags: list[str]) -> str | None:
    """Why the overload `name` (`add.Tensor`) is refused, or None when it is allowed."""
    base, _, overload = name.partition(".")
    for tag in tags:
        if tag in REFUSED_TAGS and not (tag == "dynamic_output_shape" and name in SHAPE_KNOWN_BY_ARGUMENTS):
            return REFUSED_TAGS[tag]
    for key in (base, name):
        if key in REFUSED_NAMES:
            return REFUSED_NAMES[key]
    if base.startswith("_") and base not in ALLOWED_PRIVATE:
        return "it is private"
    for part, reason in REFUSED_PARTS.items():
        if base in NOT_QUANTISED and part == "quant":
            continue
        if part in base if not part.endswith("_") else base.startswith(part):
            return reason
    if base.endswith("_copy") and base != "index_copy":
        return "copying twin of a view, made by functionalisation only"
    if "generator" in overload:
        return "it takes a random generator"
    if overload.endswith(("_out", "Dimname", "_dimname")) or overload == "out" or "names" in overload:
        return "out= and named-tensor variants are not supported"
    if not schema.returns:
        return "it returns nothing"
    for returned in schema.returns:
        if str(returned.type) not in ("Tensor", "List[Tensor]"):
            return f"it returns {returned.type}"
    for argument in schema.arguments:
        kind = str(argument.type)
        plain = kind.removeprefix("Optional[").removesuffix("]") if kind.startswith("Optional[") else kind
        if plain == "Generator" and kind == plain:
            return "it takes a random generator"
        if argument.is_out:
            return REFUSED_TAGS["out"]
        if plain == "str":
            if argument.name not in INERT_STRINGS:
                return f"its text argument {argument.name} may have an effect"
        elif plain not in ALLOWED_TYPES:
            return f"its argument {argument.name} is of type {kind}"
        if argument.name in ("names", "dimname"):
            return "named tensors are not supported"
    return None


def overloads() -> Iterator[tuple[str, Any, list[str]]]:
    """Every ATen overload of torch's dispatcher: (`add.Tensor`, schema, tags)."""
    for qualified in sorted(torch._C._dispatch_get_all_op_names()):
        namespace, _, rest = qualified.partition("::")
        if namespace != "aten":
            continue
        base, _, overload = rest.partition(".")
        packet = getattr(torch.ops.aten, base, None)
        if packet is None or (overload or "default") not in packet.overloads():
            continue
        operator = getattr(packet, overload or "default")
        yield f"{base}.{overload or 'default'}", operator._schema, [tag.name for tag in operator.tags]


def rule(name: str) -> str:
    """Why the overload `name` (`add.Tensor`) is refused, in a few words."""
    found = next((refusal(other, schema, tags) for other, schema, tags in overloads() if other == name), None)
    return found or "torch does not know it"


def generate() -> str:
    """The text of `allowlist.txt`."""
    lines = [
        "# ATen overloads that a worker runs. Made by `python -m dag.generate_allowlist`; the rules and reasons are there."
    ]
    lines += sorted(f"aten.{name}" for name, schema, tags in overloads() if refusal(name, schema, tags) is None)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the file; with `--explain NAME`, say why an overload such as `add.Tensor` is or isn't on it."""
    if sys.argv[1:2] == ["--explain"]:
        for name, schema, tags in overloads():
            if name.split(".")[0] in sys.argv[2:] or name in sys.argv[2:]:
                print(f"{name}: {refusal(name, schema, tags) or 'allowed'}")
        return
    Path(ALLOWLIST_FILE).write_text(generate())


if __name__ == "__main__":
    main()
