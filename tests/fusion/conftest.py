"""What several tests of the front door need."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_environment(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("FUSION_CONFIG_DIR", str(tmp_path_factory.mktemp("config")))
    for name in ("FUSION_COORDINATOR", "FUSION_TOKEN", "FUSION_DEBUG"):
        monkeypatch.delenv(name, raising=False)
