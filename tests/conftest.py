"""What several test files need."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexkernel import demo


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the real demo model; the first test run on a machine fetches it."""
    return demo.model()
