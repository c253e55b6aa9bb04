"""Error feedback: nothing is lost for good, and the residual decides the bits."""

from __future__ import annotations

import math

import pytest
import torch

import compress
from compress import ErrorFeedback
from fusion.errors import PlanError


@pytest.mark.parametrize("name", ["topk:ratio=10,value_bits=32", "topk-sampled:ratio=10", "int2", "int4", "bf16"])
def test_the_sum_of_what_arrives_follows_the_sum_of_what_was_sent(name: str) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    codec = compress.codec(name)
    feedback = ErrorFeedback(codec)
    sent, arrived, residual = torch.zeros(50, 40), torch.zeros(50, 40), None
    for step in range(30):
        tensor = torch.randn(50, 40, generator=generator)
        payload, residual = feedback.encode(tensor, step, residual)
        sent += tensor
        arrived += codec.decode(payload, (50, 40), "float32")
        torch.testing.assert_close(arrived + residual, sent, atol=1e-4, rtol=1e-4)


def test_the_same_residual_gives_the_same_bits() -> None:
    feedback = ErrorFeedback(compress.codec("int3", stochastic=1))
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    _, residual = feedback.encode(tensor, 1)
    first, after_first = feedback.encode(tensor, 2, residual)
    second, after_second = feedback.encode(tensor, 2, residual.clone())
    assert bytes(first) == bytes(second)
    assert torch.equal(after_first, after_second)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_leaves_no_trace(bad: float) -> None:
    tensor = torch.ones(100)
    tensor[3] = bad
    _, residual = ErrorFeedback(compress.codec("int8")).encode(tensor)
    assert bool(residual.isfinite().all())


def test_integers_have_no_residual() -> None:
    payload, residual = ErrorFeedback(compress.codec("int8")).encode(torch.arange(9))
    assert len(payload) == 72
    assert residual.numel() == 0


def test_a_residual_of_another_shape_is_refused() -> None:
    with pytest.raises(PlanError, match=r"residual of shape \[4\]"):
        ErrorFeedback(compress.codec("int8")).encode(torch.ones(3), 0, torch.ones(4))
