"""What tests of the hook share: the stand-in for AITER, fresh in each test."""

import sys

import pytest

from tests.aiter_standin.load import VERSIONS, load_aiter


@pytest.fixture(params=VERSIONS)
def any_aiter(request):
    return load_aiter(request.param)


@pytest.fixture
def aiter():
    return load_aiter("main")


@pytest.fixture
def switch_often():
    """Threads switch a thousand times as often as usual, so that they meet at awkward places."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(usual / 1000)
    yield
    sys.setswitchinterval(usual)
