from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def inputs() -> Path:
    """Real models and texts that do not come with the repository."""
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("ATTNLAB_INPUTS", root.parent / "shared" / "inputs"))
    if not (folder / "stories260k").is_dir():
        pytest.skip("the real inputs are not here; ATTNLAB_INPUTS says where they are")
    return folder
