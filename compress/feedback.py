"""Error feedback: what a codec loses of one tensor is added to the next one, so that it is late rather than lost.

The residual is state of the sending fragment: it goes into the fragment's snapshot, and a replay that starts from the same
residual sends the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.codecs import Codec
from compress.places import Places
from fusion.errors import PlanError


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """Wraps a codec; the residual goes in and comes out with each call, for the caller to keep."""

    codec: Codec

    def encode(
        self, tensor: Tensor, seed: int = 0, residual: Tensor | None = None, places: Places | None = None
    ) -> tuple[memoryview, Tensor]:
        """Payload and new residual (float32, of the tensor's shape; floating tensors only).

        Where a value is not finite the residual starts again from zero, so that one bad step does not spoil all later ones.
        Raises `PlanError` when `residual` has another shape.
        """
        if not tensor.is_floating_point():
            return self.codec.encode(tensor, seed), torch.empty(0)
        wanted = tensor.detach().to("cpu", torch.float32)
        if residual is not None:
            if residual.shape != tensor.shape:
                raise PlanError(f"residual of shape {list(residual.shape)} for a tensor of shape {list(tensor.shape)}")
            wanted = wanted + residual
        sent = wanted.to(tensor.dtype)
        payload = self.codec.encode(sent, seed, places)
        left = wanted - self.codec.decode(payload, tuple(sent.shape), sent.dtype).to(torch.float32)
        return payload, left.nan_to_num_(0.0, 0.0, 0.0)
