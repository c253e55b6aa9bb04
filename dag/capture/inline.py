"""Flattens torch.export's graph into drafts: wrapped sub-graphs inlined, torch's spellings turned into ours."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node

from dag.allowlist import ALLOWED, GETITEM
from dag.capture.autocast import Region
from dag.capture.blame import line_of_stack, module_words
from dag.capture.draft import Draft, Value
from dag.generate_allowlist import rule
from dag.graph import DTYPE_BYTES
from dag.operators import dtype_name, named
from fusion.errors import CaptureError

_ASSERTIONS = frozenset(
    {
        "aten._assert_tensor_metadata.default",
        "aten._assert_async.msg",
        "aten._assert_async.default",
        "aten._assert_scalar.default",
        "aten._functional_assert_async.msg",
        "aten.sym_constrain_range.default",
        "aten.sym_constrain_range_for_size.default",
        "aten._check_tensor_all.default",
    }
)

_RENAMED = {
    # A view of a tensor that came over a link may find other strides than the tracer saw; reshape copes.
    "aten.view.default": "aten.reshape.default",
    "aten._unsafe_view.default": "aten.reshape.default",
    "aten._reshape_alias.default": "aten.reshape.default",
    "aten.lift_fresh_copy.default": "aten.clone.default",
    "aten.detach_.default": "aten.detach.default",
    # Uninitialised memory would differ from run to run, and could show another job's data.
    "aten.empty.memory_format": "aten.zeros.default",
    "aten.empty_strided.default": "aten.zeros.default",
    "aten.empty_permuted.default": "aten.zeros.default",
    "aten.empty_like.default": "aten.zeros_like.default",
    "aten.new_empty.default": "aten.new_zeros.default",
    "aten.new_empty_strided.default": "aten.new_zeros.default",
}
_PASS_THROUGH = frozenset({"aten.alias.default", "aten.lift_fresh.default", "aten.lift.default"})
# What stays of torch.vmap, torch.func.grad and torch.func.jvp.
_TRANSFORMS = (
    "add_batch_dim",
    "remove_batch_dim",
    "vmap_",
    "unwrap_for_grad",
    "wrap_for_grad",
    "grad_",
    "jvp_",
    "make_dual",
    "unpack_dual",
    "enter_dual",
    "exit_dual",
)
_DROPPED_KEYWORDS = frozenset({"pin_memory"})


@dataclass(frozen=True)
class _Context:
    no_grad: bool = False
    autocast: Region | None = None
    outermost: Region | None = None
    """The region whose weight cache nested regions share."""


def inline(program: ExportedProgram, example_names: tuple[str, ...], autocast: str | None) -> tuple[list[Draft], Draft]:
    """Drafts of the whole program in order, inputs first, and the one that is the loss; all under `autocast`, if given.

    Raises `CaptureError`.
    """
    region = None if autocast is None else Region(autocast)
    flattener = _Flattener(program, example_names)
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    results = flattener.graph(
        program.graph_module,
        [flattener.leaf(node, spec) for node, spec in zip(inputs, program.graph_signature.input_specs, strict=True)],
        _Context(autocast=region, outermost=region),
    )
    loss = results[-1]
    if not isinstance(loss, Draft):
        raise CaptureError("the loss is a constant; it must be computed from the model's output")
    return flattener.drafts, loss


class _Flattener:
    def __init__(self, program: ExportedProgram, example_names: tuple[str, ...]) -> None:
        self.program = program
        self.drafts: list[Draft] = []
        self.example_names = iter(example_names)

    def leaf(self, node: Node, spec: Any) -> Draft:
        """The draft of a parameter, buffer, constant or example input."""
        kind = {
            InputKind.PARAMETER: "parameter",
            InputKind.BUFFER: "buffer",
            InputKind.CONSTANT_TENSOR: "constant",
            InputKind.USER_INPUT: "placeholder",
        }.get(spec.kind)
        if kind is None:
            raise _error(
                next(iter(node.users), node),
                f"the model uses {spec.target or node.name}, which is no tensor and can't be captured (a torch.Generator? "
                "leave it out, every operator gets its own seed)",
            )
        target = next(self.example_names) if kind == "placeholder" else str(spec.target)
        draft = Draft(name=target if kind == "placeholder" else node.name, kind=kind, target=target)  # type: ignore[arg-type]
        self.drafts.append(draft)
        return draft

    def graph(self, module: GraphModule, inputs: list[Any], context: _Context) -> tuple[Any, ...]:
        """Append the drafts of one (sub-)graph run on `inputs`; gives its outputs."""
        values: dict[Node, Any] = {}
        arriving = iter(inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(arriving)
            elif node.op == "get_attr":
                values[node] = self._attribute(module, node)
            elif node.op == "call_function":
                values[node] = self._call(node, values, context)
            elif node.op == "output":
                results = torch.fx.node.map_arg(node.args[0], lambda item: values[item])
                return tuple(results) if isinstance(results, tuple | list) else (results,)
            else:
                raise _error(node, f"torch.export left a {node.op} of {node.target}, which can't be captured")
        raise CaptureError("torch.export gave a graph without output")

    def _attribute(self, module: GraphModule, node: Node) -> Any:
        value = operator.attrgetter(str(node.target))(module)
        if isinstance(value, GraphModule):
            return value
        raise _error(node, f"{node.target} is not an operator's value; register it as a buffer")

    def _call(self, node: Node, values: Mapping[Node, Any], context: _Context) -> Any:
        target: Any = node.target
        arguments: Any = torch.fx.node.map_arg((node.args, node.kwargs), lambda item: values[item])
        args, kwargs = arguments
        if target is operator.getitem and isinstance(args[0], tuple):
            return args[0][args[1]]
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._wrapped(node, target, list(args), context)
        functional = _without_out(target)
        out = kwargs.get("out") if functional is not None else None
        name = GETITEM if target is operator.getitem else _overload_name(functional or target)
        if name in _ASSERTIONS or not _gives_tensors(node, name):
            return None
        if name in _PASS_THROUGH:
            return args[0]
        draft = Draft(
            name=node.name,
            kind="call",
            target=name,
            args=tuple(_plain(arg, node) for arg in args),
            kwargs={
                key: _plain(arg, node)
                for key, arg in kwargs.items()
                if key not in _DROPPED_KEYWORDS and not (key == "out" and functional is not None)
            },
            module=_module_path(node),
            no_grad=context.no_grad,
            autocast=context.autocast,
            where=line_of_stack(node.meta.get("stack_trace")),
        )
        _respell(draft)
        if draft.target not in ALLOWED:
            raise _error(node, f"operator {draft.target} can't be captured: {_why_refused(draft.target)}")
        self.drafts.append(draft)
        if isinstance(out, Draft):
            # What `out=` says is written with the result.
            draft = replace(draft, name=f"{node.name}_out", target="aten.copy_.default", args=(out, draft), kwargs={})
            self.drafts.append(draft)
        return draft

    def _wrapped(self, node: Node, target: Any, args: list[Any], context: _Context) -> tuple[Any, ...]:
        """Inline a higher-order operator that only sets a context for its sub-graph."""
        name = target.name()
        if name == "wrap_with_set_grad_enabled":
            enabled, body, *inputs = args
            return self.graph(body, inputs, replace(context, no_grad=not enabled))
        if name == "wrap_with_autocast":
            # torch.export records the weight cache as off, whatever the model says; it is on unless someone asks.
            device, dtype, enabled, _, body, *inputs = args
            if device != "cpu":
                return self.graph(body, inputs, context)
            region = Region(dtype_name(dtype or torch.bfloat16))
            outermost = context.outermost or region
            region.casts = outermost.casts
            return self.graph(body, inputs, replace(context, autocast=region if enabled else None, outermost=outermost))
        if name in ("tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap", "invoke_subgraph"):
            body, *inputs = args
            if name == "invoke_subgraph":
                inputs = inputs[1:]
            return self.graph(body, inputs, context)
        raise _error(
            node,
            f"{name} can't be captured; write it without torch.cond, while_loop, map or other control flow operators",
        )


def _gives_tensors(node: Node, name: str) -> bool:
    """False for a call whose result is not a tensor and unused; raises for one whose result is used."""
    value = node.meta.get("val")
    if value is None and name == "aten.copy_.default":
        # The write-back of a buffer that was assigned to; torch.export adds it without a value.
        return True
    if name == GETITEM or isinstance(value, torch.Tensor | tuple | list):
        _check_dtypes(node, value)
        return True
    if not node.users:
        return False
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        raise _error(node, "a shape or a Python number depends on a tensor's values; keep shapes fixed")
    raise _error(node, f"operator {name} gives a {type(value).__name__}, not a tensor")


def _check_dtypes(node: Node, value: Any) -> None:
    for tensor in value if isinstance(value, tuple | list) else (value,):
        if not isinstance(tensor, torch.Tensor):
            continue
        if any(isinstance(size, torch.SymInt) for size in tensor.shape):
            raise _error(
                node,
                "an output shape depends on values (nonzero, masked_select, x[mask], unique); "
                "keep shapes fixed, for example with torch.where",
            )
        if tensor.dtype.is_complex and dtype_name(tensor.dtype) not in DTYPE_BYTES:
            raise _error(node, f"tensors of dtype {tensor.dtype} are not supported; compute with complex64, of float32")
        if tensor.layout != torch.strided:
            raise _error(node, f"{tensor.layout} tensors are not supported")
        if dtype_name(tensor.dtype) not in DTYPE_BYTES:
            raise _error(node, f"tensors of dtype {tensor.dtype} are not supported")


def _without_out(target: Any) -> torch._ops.OpOverload | None:
    """The overload that gives what `target` writes to its one `out=`; None for any other target."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    given = [argument for argument in target._schema.arguments if not argument.is_out]
    if len(given) != len(target._schema.arguments) - 1:
        return None
    wanted = [(argument.name, str(argument.type)) for argument in given]
    for overload in target.overloadpacket.overloads():
        found = getattr(target.overloadpacket, overload)
        if [(argument.name, str(argument.type)) for argument in found._schema.arguments] == wanted:
            return found  # type: ignore[no-any-return]
    return None


def _overload_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, packet = target._schema.name.partition("::")
        return f"{namespace}.{packet}.{target._overloadname}"
    return getattr(target, "__name__", str(target))


def _plain(arg: Any, node: Node) -> Value:
    """A torch argument as a plain value. Raises `CaptureError` for what a DAG can't say."""
    if arg is None or isinstance(arg, bool | int | float | str | Draft):
        return arg
    if isinstance(arg, tuple | list):
        return tuple(_plain(item, node) for item in arg)
    torch_name = named(arg)
    if torch_name is not None:
        return torch_name
    if isinstance(arg, torch.Generator):
        raise _error(
            node, "a torch.Generator can't be captured; leave the generator out, every operator gets its own seed"
        )
    if isinstance(arg, complex):
        raise _error(node, "a complex number in Python can't be captured; make it a tensor, as torch.tensor(1j)")
    raise _error(node, f"an argument of type {type(arg).__name__} can't be captured; shapes and numbers must be fixed")


def _respell(draft: Draft) -> None:
    """Change the target to the spelling that the DAG uses, with its arguments."""
    before = draft.target
    draft.target = _RENAMED.get(before, before)
    if before in ("aten.empty.memory_format", "aten.empty_like.default"):
        if before == "aten.empty.memory_format":
            draft.kwargs.pop("memory_format", None)
    elif before in ("aten.empty_strided.default", "aten.empty_permuted.default"):
        draft.args = draft.args[:1]
    elif before == "aten.new_empty_strided.default":
        draft.args = draft.args[:2]


def _module_path(node: Node) -> str:
    """The innermost module's path within the user's model; "" for the model itself and the loss."""
    return _module(node)[0]


def _module(node: Node) -> tuple[str, str]:
    """That path, and the module's class."""
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = next(reversed(stack.values())) if stack else ("", "")
    # The same module called again is spelled `name@1`.
    path = str(path).split("@")[0]
    return (path.removeprefix("model."), _class_name(kind)) if path.startswith("model.") else ("", "")


def _class_name(kind: object) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]


def _why_refused(target: str) -> str:
    if target.removeprefix("_").startswith(_TRANSFORMS):
        return "it is of torch.func (vmap, grad, jvp); write the computation over the batch, without it"
    if not target.startswith("aten."):
        return "it is not one of torch's own; write it with torch functions"
    return f"workers don't run it ({rule(target.removeprefix('aten.'))}); write it with other torch functions"


def _error(node: Node, message: str) -> CaptureError:
    path, kind = _module(node)
    place = line_of_stack(node.meta.get("stack_trace")) or (module_words(path, kind) if path else "")
    return CaptureError(f"{place}: {message}" if place else message)
