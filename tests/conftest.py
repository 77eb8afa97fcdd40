import pytest
import torch
from torch.torch_version import TorchVersion

from tests.support import small_network


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _with_harmless_pickles(monkeypatch):
    """Let older releases of torch, for which pickles are refused, read those of the tests."""
    if torch.__version__ < TorchVersion("2.10"):
        for module in ("legacy.pickles", "models.own_networks"):
            monkeypatch.setattr(f"parchgrad.{module}.SAFE_TORCH", TorchVersion("2.4"))


@pytest.fixture
def network():
    return small_network()
