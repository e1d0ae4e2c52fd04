import pytest

from tests.tuning.made_up_gpu import Gpu, in_place_of_torch_cuda


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return in_place_of_torch_cuda(monkeypatch)
