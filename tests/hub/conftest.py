"""The Hub that the tests of this folder push to and load from."""

import pytest
from server import Hub


@pytest.fixture
def hub():
    """Alice has a token that writes and one that reads, Bob one that writes."""
    with Hub({"tok-a": ("alice", "write"), "tok-r": ("alice", "read"), "tok-b": ("bob", "write")}) as hub:
        yield hub
