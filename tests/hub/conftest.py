"""The Hub that the tests in this folder push to and load from."""

import pytest

from tests.hub.server import TOKENS, Hub


@pytest.fixture
def hub():
    """Alice has a token with write access and one with read access, Bob one with write access."""
    with Hub(TOKENS) as hub:
        yield hub
