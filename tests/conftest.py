"""tests/helpers.py and tests/compiling.py importable by their names under --import-mode=importlib; fixtures of several files."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a shared machine take thirty times as long over small tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
