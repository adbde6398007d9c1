"""What all tests share. The environment is set before anything imports torch or huggingface_hub, which read it once."""

import logging
import os
from pathlib import Path

import pytest

# Our images are small: a second thread mostly waits for the first, and on a busy machine it waits ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the project; not part of it, so a test that asks for it may be skipped."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data sets are not here: no folder ../shared/data beside the project")
    return folder


@pytest.fixture
def diffusers_log(caplog):
    """Records of diffusers' logger, which does not propagate."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
