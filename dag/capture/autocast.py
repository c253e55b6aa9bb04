"""Makes the casts of mixed precision ordinary ops, so that a worker needs no autocast to get the same bits.

torch.export records what the user called, above autocast: the casts are not in its graph. Each op of an autocast region
is therefore run once, under autocast, on tensors without data, and the casts that it makes are watched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from dag.allowlist import ALLOWED, GETITEM
from dag.capture.draft import Draft, number_one
from dag.graph import Named, TensorMeta
from dag.operators import dtype_name, named, run, torch_dtype
from dag.propagate import CPU, fake
from dag.quiet import quiet
from fusion.errors import CaptureError

CAST = "aten.to.dtype"


@dataclass(eq=False)
class Region:
    """A stretch of ops under `torch.autocast` on the CPU.

    `casts` is torch's weight cache: the cast of a parameter is made once in the outermost region and shared, and so are
    the gradients that flow through it.
    """

    dtype: str
    casts: dict[tuple[Draft, str], Draft] = field(default_factory=dict)


def explicit_casts(drafts: Sequence[Draft], leaves: Mapping[Draft, TensorMeta]) -> list[Draft]:
    """`drafts` with a cast op wherever autocast makes one. Raises `CaptureError` for what can't be taken apart."""
    if not any(draft.autocast for draft in drafts):
        return list(drafts)
    return _Expansion(leaves).expand(drafts)


class _Expansion:
    def __init__(self, leaves: Mapping[Draft, TensorMeta]) -> None:
        self.leaves = leaves
        self.values: dict[Draft, Any] = {}
        self.result: list[Draft] = []
        self.replaced: dict[Draft, Draft] = {}

    def expand(self, drafts: Sequence[Draft]) -> list[Draft]:
        with quiet(), FakeTensorMode(), torch.enable_grad():
            for draft in drafts:
                draft.substitute(lambda source: self.replaced.get(source, source))
                if draft.kind not in ("call", "loss"):
                    self.values[draft] = fake(self.leaves[draft], requires_grad=draft.kind == "parameter")
                    self.result.append(draft)
                elif draft.autocast is None or draft.kind == "loss" or draft.target == GETITEM:
                    self.append(draft)
                else:
                    self.cast(draft, draft.autocast)
        return self.result

    def append(self, draft: Draft) -> None:
        """Keep `draft` as it is, and run it."""
        try:
            self.values[draft] = _run(draft, self.values)
        except Exception as error:
            raise _refused(draft, " ".join(str(error).split())[:300]) from error
        self.result.append(draft)

    def cast(self, draft: Draft, region: Region) -> None:
        name = draft.target.removeprefix("aten.").removesuffix(".default")
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCPU"):
            casts = {
                source: self.cast_of(source, dtype, draft, region)
                for source, dtype in _casts_of(draft, self.values, region).items()
            }
            draft.substitute(lambda source: casts.get(source, source))
            self.append(draft)
        elif _calls(draft, self.values, region) == _calls(draft, self.values, None):
            self.append(draft)
        else:
            self.take_apart(draft, region)

    def cast_of(self, source: Draft, dtype: str, draft: Draft, region: Region) -> Draft:
        """The op that casts `source` for `draft`: made now, or found in the cache."""
        value = self.values[source]
        cached = dtype == region.dtype and source.kind == "parameter" and value.dtype == torch.float32
        if cached and (source, dtype) in region.casts:
            return region.casts[(source, dtype)]
        made = Draft(
            name=f"{source.name}_{dtype}",
            kind="call",
            target=CAST,
            args=(source, Named("dtype", dtype)),
            module=draft.module,
            no_grad=draft.no_grad,
            where=draft.where,
        )
        self.append(made)
        if cached:
            region.casts[(source, dtype)] = made
        return made

    def take_apart(self, draft: Draft, region: Region) -> None:
        """Replace a composite op by the primitive ones that it calls under autocast, casts among them."""
        sources = list(dict.fromkeys(draft.inputs()))
        op = number_one(draft, sources)

        def body(*tensors: torch.Tensor) -> Any:
            with _autocast(region):
                return run(op, dict(enumerate(tensors)), CPU)

        graph = make_fx(body)(*(self.values[source] for source in sources)).graph
        made: dict[torch.fx.Node, Draft] = {}
        arriving = iter(sources)
        for node in graph.nodes:
            if node.op == "placeholder":
                made[node] = next(arriving)
            elif node.op == "call_function":
                made[node] = self.piece(draft, region, node, made)
            elif node.op == "output":
                if not isinstance(node.args[0], torch.fx.Node):
                    raise _refused(draft, "it has several outputs")
                self.replaced[draft] = made[node.args[0]]
            else:
                raise _refused(draft, f"it needs {node.target}")

    def piece(self, draft: Draft, region: Region, node: torch.fx.Node, made: dict[torch.fx.Node, Draft]) -> Draft:
        target = str(node.target)
        if target == "aten._to_copy.default" and set(node.kwargs) == {"dtype"}:
            source: Any = node.args[0]
            return self.cast_of(made[source], dtype_name(node.kwargs["dtype"]), draft, region)  # type: ignore[arg-type]
        target = {"aten.view.default": "aten.reshape.default", "aten._unsafe_view.default": "aten.reshape.default"}.get(
            target, target
        )
        if target not in ALLOWED:
            raise _refused(draft, f"it runs {target} inside")

        def plain(value: Any) -> Any:
            if isinstance(value, torch.fx.Node):
                return made[value]
            return tuple(plain(item) for item in value) if isinstance(value, tuple | list) else named(value) or value

        piece = Draft(
            name=f"{draft.name}_{node.name}",
            kind="call",
            target=target,
            args=tuple(plain(arg) for arg in node.args),
            kwargs={name: plain(arg) for name, arg in node.kwargs.items()},
            module=draft.module,
            no_grad=draft.no_grad,
            where=draft.where,
        )
        self.append(piece)
        return piece


def _refused(draft: Draft, reason: str) -> CaptureError:
    place = f"{draft.where}: " if draft.where else ""
    return CaptureError(
        f"{place}{draft.target} can't be captured under autocast ({reason}); "
        'keep it in float32 with torch.autocast("cpu", enabled=False)'
    )


def _autocast(region: Region | None) -> torch.autocast:
    dtype = torch.bfloat16 if region is None else torch_dtype(region.dtype)
    return torch.autocast("cpu", dtype, enabled=region is not None, cache_enabled=False)


def _run(draft: Draft, values: Mapping[Draft, Any]) -> Any:
    sources = list(dict.fromkeys(draft.inputs()))
    return run(number_one(draft, sources), {index: values[source] for index, source in enumerate(sources)}, CPU)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator that reaches the bottom, with its first argument."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.prim.device.default:
            self.calls.append((str(func), args[0] if args else None, kwargs.get("dtype")))
        return func(*args, **kwargs)


def _watched(draft: Draft, values: Mapping[Draft, Any], region: Region | None) -> list[tuple[str, Any, Any]]:
    with _autocast(region), _Watch() as watch:
        _run(draft, values)
        calls: list[tuple[str, Any, Any]] = watch.calls
    return calls


def _casts_of(draft: Draft, values: Mapping[Draft, Any], region: Region) -> dict[Draft, str]:
    """Which arguments autocast casts before the operator itself runs, and to what.

    All to one dtype: what is cast to another one, or also without autocast, the operator casts itself, and back at its end.
    """
    if _calls(draft, values, region) == _calls(draft, values, None):
        return {}
    sources = {id(values[source]): source for source in draft.inputs() if isinstance(values[source], torch.Tensor)}
    casts: dict[Draft, str] = {}
    for name, argument, dtype in _watched(draft, values, region):
        if name != "aten._to_copy.default" or id(argument) not in sources or dtype is None:
            break
        if casts and dtype_name(dtype) not in casts.values():
            break
        casts[sources[id(argument)]] = dtype_name(dtype)
    return casts


def _calls(draft: Draft, values: Mapping[Draft, Any], region: Region | None) -> list[tuple[str, str]] | None:
    """The operators and dtypes a composite op comes down to; None when it does not run at all."""
    try:
        return [(name, str(dtype)) for name, _, dtype in _watched(draft, values, region)]
    except Exception:
        # Mixed dtypes that only autocast reconciles; that differs from whatever autocast gives.
        return None
