from __future__ import annotations

import pytest

from flows.progress import artifact_key


@pytest.mark.parametrize(
    ("name", "key"),
    [("training-unet3plus", "training-unet3plus"), ("training-My_UNet++", "training-my-unet")],
)
def test_artifact_key_has_what_prefect_allows(name: str, key: str) -> None:
    assert artifact_key(name) == key
