import pytest
import torch


@pytest.fixture
def compiler():
    """For tests that compile: what others compiled, and what they did, counts towards one limit."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
