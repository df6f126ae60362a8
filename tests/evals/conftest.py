"""What several modules of this folder share."""

import pytest

import vjepa


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of an untrained debug encoder, as --model takes it."""
    folder = tmp_path_factory.mktemp("model")
    vjepa.hub.save_pretrained(vjepa.create_model("vit_debug"), folder)
    return str(folder)
