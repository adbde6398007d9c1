"""A model of the Hub as the first ones were uploaded: weights in a .bin file, all files beside model_index.json."""

import pytest

from tests.hub.commands import run_code
from tests.models import tiny_pipe

LOAD = """
import json, warnings
from ddpm_pipeline import DDPMPipeline
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    pipe = DDPMPipeline.from_pretrained("alice/old")
print(json.dumps({
    "warnings": [str(w.message) for w in caught if "safetensors" in str(w.message)],
    "sum": sum(tensor.double().sum().item() for tensor in pipe.unet.state_dict().values()),
}))
"""


def test_bin_weights_of_the_hub(hub, tmp_path):
    pipe = tiny_pipe()
    pipe.save_pretrained(tmp_path / "model", safe_serialization=False)
    files = {file.name: file.read_bytes() for file in (tmp_path / "model").rglob("*") if file.is_file()}
    hub.create("alice/old", files=files)
    report = run_code(hub, tmp_path / "home", LOAD)
    assert report["sum"] == pytest.approx(
        sum(tensor.double().sum().item() for tensor in pipe.unet.state_dict().values())
    )
    assert len(report["warnings"]) == 1
