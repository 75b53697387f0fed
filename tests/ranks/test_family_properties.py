"""What the server promises of any model, asked of a family with all that is new in attention."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.family_properties import PROPERTIES, check_family
from tests.ranks.test_families import IS_TRANSFORMERS_4


@pytest.mark.ranks
@pytest.mark.skipif(IS_TRANSFORMERS_4, reason="has no Gemma 4")
def test_all_properties_hold(tmp_path: Path) -> None:
    row = check_family("gemma4_text", tmp_path, [1, 2])
    assert row == f"| `gemma4_text` |{' yes |' * len(PROPERTIES)}"
