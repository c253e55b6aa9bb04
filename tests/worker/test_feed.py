"""Feeding placeholders: the right samples, the right shapes, clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from worker_cases import make_case

from fusion.errors import DataError
from fusion.messages import DataManifest
from fusion.sampling import SampleOrder
from worker.jobs.feed import Feed, Source, sources

CASE = make_case(eval_every=2)
PLACEHOLDERS = tuple(op.id for op in CASE.dag.placeholders)


def manifest(**changes: Any) -> DataManifest:
    return CASE.prepare(("a",)).data.model_copy(update=changes)


def test_micro_batches_follow_the_sample_order() -> None:
    found = sources(CASE.dag, PLACEHOLDERS, manifest(), 2)
    feed = Feed(found, CASE.data, manifest(), CASE.train)
    order = SampleOrder(CASE.train.seed, 16, 3, 2)
    values = feed.training(3, 1, ["inputs", "targets"])
    assert torch.equal(values["inputs"], CASE.data["inputs"][order.micro_batch(3, 1)])
    assert torch.equal(values["targets"], CASE.data["targets"][order.micro_batch(3, 1)])
    assert torch.equal(feed.evaluation(1, ["inputs"])["inputs"], CASE.data["inputs"][18:20])


def test_tokens_give_inputs_and_the_next_tokens() -> None:
    tokens = torch.arange(41)
    data = manifest(kind="tokens", samples=10, train_samples=8, sequence_length=4)
    found = {
        "inputs": Source("tokens", "inputs", (2, 4), torch.int64),
        "targets": Source("tokens", "targets", (2, 4), torch.int64),
    }
    feed = Feed(found, {"tokens": tokens}, data, CASE.train.model_copy(update={"eval_batches": 1}))
    values = feed.evaluation(0, ["inputs", "targets"])
    assert values["inputs"].tolist() == [[32, 33, 34, 35], [36, 37, 38, 39]]
    assert values["targets"].tolist() == [[33, 34, 35, 36], [37, 38, 39, 40]]
    with pytest.raises(DataError, match="has 9 samples, the job says 10"):
        Feed(found, {"tokens": tokens[:40]}, data, CASE.train.model_copy(update={"eval_batches": 1}))
    with pytest.raises(DataError, match="sequence_length"):
        Feed(found, {"tokens": tokens}, data.model_copy(update={"sequence_length": None}), CASE.train)


def test_data_that_does_not_fit_the_model_is_refused() -> None:
    found = sources(CASE.dag, PLACEHOLDERS, manifest(), 2)
    wrong = {**CASE.data, "inputs": torch.randn(20, 7)}
    with pytest.raises(DataError, match=r"samples of 'inputs' have shape \[7\], captured were \[6\]"):
        Feed(found, wrong, manifest(), CASE.train)
    with pytest.raises(DataError, match="has 3 samples, the job says 20"):
        Feed(found, {**CASE.data, "targets": torch.randn(3, 6)}, manifest(), CASE.train)
    with pytest.raises(DataError, match="its first axis must be the micro-batch of 5"):
        sources(CASE.dag, PLACEHOLDERS, manifest(), 5)
    with pytest.raises(DataError, match="token data feeds"):
        sources(CASE.dag, PLACEHOLDERS, manifest(kind="tokens", feeds={"inputs": "x"}, sequence_length=3), 2)
    with pytest.raises(DataError, match="the held-out samples fill 2"):
        Feed(found, CASE.data, manifest(), CASE.train.model_copy(update={"eval_batches": 3}))
