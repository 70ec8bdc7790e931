"""--offload and --device as a user gives them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.conftest import Keye
from tests.kernels.on_device import CUDA

no_gpu = pytest.mark.skipif(CUDA, reason="this machine has a GPU")


@no_gpu
def test_experts_stay_where_there_is_no_gpu(keye: Keye, clip: Path) -> None:
    code, out, err = keye("ask", str(clip), "What?", "--offload", "experts")
    assert (code, out) == (2, "")
    assert err == (
        "keye: --offload experts keeps a GPU's experts in this machine's memory, and the device is cpu: leave the option out\n"
    )


@no_gpu
def test_offload_from_the_environment_and_the_file(
    keye: Keye, clip: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "keye.toml").write_text('offload = "experts"\n')
    assert keye("plan", str(clip))[0] == 2
    code, _, err = keye("plan", str(clip), "--offload", "none")
    assert (code, err) == (0, "")
    monkeypatch.setenv("KEYE_OFFLOAD", "none")
    assert keye("plan", str(clip))[0] == 0


def test_what_is_not_known(keye: Keye, clip: Path) -> None:
    code, _, err = keye("plan", str(clip), "--offload", "layers")
    assert (code, err) == (2, "keye: --offload must be none or experts, not layers\n")
