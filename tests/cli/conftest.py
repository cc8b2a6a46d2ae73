"""What tests of commands share: a tiny model."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def model(save_model, tiny_config, tmp_path_factory) -> str:
    return str(save_model(tiny_config(), tmp_path_factory.mktemp("cli") / "tiny", dtype=torch.bfloat16))
