"""A model of transformers on the Hub of server.py as an extractor. In this process: a child would import all of it."""

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from ddpm_pipeline.features import make_extractor
from tests.hub_models import save_dinov2

pytest.importorskip("transformers", reason="transformers is not installed: extra `eval`")


@pytest.fixture
def client(hub, tmp_path, monkeypatch):
    """huggingface_hub reads these once, when it is imported."""
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": True,
    }.items():
        assert hasattr(constants, name)
        monkeypatch.setattr(constants, name, value)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    huggingface_hub.close_session()
    yield hub
    huggingface_hub.close_session()


def load(which):
    extractor = make_extractor(which)
    features = extractor.of_floats(torch.linspace(0, 1, 3 * 30 * 30).view(1, 3, 30, 30))
    return extractor.name, extractor.commit, extractor.key, features.tolist()


def test_a_model_on_the_hub_is_loaded_at_its_commit_and_without_a_connection_again(client, tmp_path, monkeypatch):
    folders = [save_dinov2(tmp_path / f"model-{seed}", seed=seed) for seed in (1, 2)]
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    code = {"pytorch_model.bin": b"a pickle", "code.py": b"raise SystemExit('the code ran')"}
    first = client.create("alice/dino", files=files[0] | code).head
    loaded = load("alice/dino")
    assert loaded[:2] == ("alice/dino", first.sha)
    assert loaded[2:] == load(str(folders[0]))[2:]  # key and features: the cache knows the content, not the place
    assert client.requests_of("GET", "model.safetensors")
    assert not client.requests_of("GET", "pytorch_model.bin") and not client.requests_of("GET", "code.py")
    for missing in ("alice/none", "alice/dino@nowhere"):
        with pytest.raises(ValueError, match=f"^extractor is '{missing}': there is no folder of this name.*\\)$"):
            load(missing)

    second = client.push("alice/dino", files[1])
    newest, pinned = load("alice/dino"), f"alice/dino@{first.sha}"
    assert newest[1] == second.sha and newest[2] != loaded[2]
    assert load(pinned) == loaded

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    number = len(client.requests)
    assert load("alice/dino") == newest
    assert load(pinned) == loaded
    with pytest.raises(ValueError, match=r"^extractor is 'alice/other': .*LocalEntryNotFoundError"):
        load("alice/other")
    assert len(client.requests) == number
