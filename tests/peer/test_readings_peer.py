"""Head detection, composition and published Jacobian lenses beside TransformerLens 4.3.0, in a process of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformer_lens", reason="TransformerLens is not installed (extra 'peer')")


@pytest.fixture(scope="module")
def both(measured_beside: dict[str, Any]) -> Any:
    return measured_beside["readings_peer"]


def test_the_head_detector_says_the_same(both: Any) -> None:
    ours, theirs = both["ours"]["scores"], both["theirs"]["scores"]
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        if name.startswith("error"):
            assert ours[name] == wanted
        else:
            # Their attention is computed in Python: a few ulps. "abs" is rounded to three places, which may fall apart.
            tolerance = 1.01e-3 if name.endswith(" 1") else 1e-5
            np.testing.assert_allclose(ours[name], wanted, atol=tolerance, err_msg=name)


def test_utilities_give_the_same_for_what_is_valid(both: Any) -> None:
    ours, theirs = both["ours"]["utilities"], both["theirs"]["utilities"]
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert _close(ours[name], wanted), name


def _close(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_close, ours, theirs))
    return ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_composition_of_raw_weights_is_theirs(both: Any) -> None:
    for mode, wanted in both["theirs"]["composition"].items():
        np.testing.assert_allclose(both["ours"]["composition"][mode], wanted, rtol=1e-4, atol=1e-6)


def test_they_read_our_jacobian_lens_and_we_theirs(both: Any) -> None:
    assert both["ours"]["readout"] == both["theirs"]["readout"]
    np.testing.assert_allclose(both["ours"]["readout values"], both["theirs"]["readout values"], rtol=1e-4, atol=1e-5)
    assert both["ours"]["back"]
