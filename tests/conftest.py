"""Settings every test shares."""

import logging
import sys
from pathlib import Path

import pytest
import torch

# So that tests, and the processes they start, can import the support modules by name.
sys.path.insert(0, str(Path(__file__).parent / "support"))
# Tests measure nothing; more threads only make several test processes fight for the cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _default_logging():
    """Let caplog see the package's records even after a test has set up its logging."""
    logger = logging.getLogger("hunyuan_train")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    logger.propagate = True
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give drills, which start jobs and wait for them, the time a busy machine takes."""
    for item in items:
        if "resilience" in item.path.parts and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900))
