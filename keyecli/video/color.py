"""Maps HDR pictures (PQ and HLG, BT.2020) to ordinary 8-bit RGB."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np

Transfer = Literal["sdr", "pq", "hlg"]

SDR_WHITE_NITS = 203.0  # reference white of ITU-R BT.2408
HDR_PEAK_NITS = 1000.0  # mastering peak assumed; brighter light is clipped
_DISPLAY_GAMMA = 2.4  # ITU-R BT.1886
_PQ_M1, _PQ_M2 = 2610 / 16384, 2523 / 4096 * 128
_PQ_C1, _PQ_C2, _PQ_C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
_HLG_A = 0.17883277
_HLG_B, _HLG_C = 1 - 4 * _HLG_A, 0.5 - _HLG_A * np.log(4 * _HLG_A)
_HLG_SYSTEM_GAMMA = 1.2  # for a display of 1000 nits
_BT2020_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)
_BT2020_TO_BT709 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]],
    np.float32,
)


def transfer_of(color_trc: int) -> Transfer:
    """The kind of picture an ITU-T H.273 transfer characteristic number means: 16 is PQ, 18 is HLG, others are SDR."""
    return {16: "pq", 18: "hlg"}.get(color_trc, "sdr")  # type: ignore[return-value]


def tone_map(rgb: np.ndarray, transfer: Transfer) -> np.ndarray:
    """8-bit BT.709 RGB [H, W, 3] of a 16-bit BT.2020 RGB picture [H, W, 3] that is PQ or HLG coded.

    Light is taken in nits on a 1000-nit display (HLG through its system gamma of 1.2), compressed into
    0..203 nits by the curve of ITU-R BT.2390 (unchanged up to about 95 nits, then a soft knee) applied to
    the largest of R, G and B so that hues stay, brought to BT.709 primaries with what lies outside clipped,
    and coded for a BT.1886 display.
    """
    light = _linear_table(transfer)[rgb]
    if transfer == "hlg":
        luma = np.maximum(light @ _BT2020_LUMA, 1e-6)
        light *= (HDR_PEAK_NITS * luma ** (_HLG_SYSTEM_GAMMA - 1))[..., None]
    peak = np.clip(light.max(axis=-1), 1e-4, HDR_PEAK_NITS)
    gain = _compressed_nits(peak) / np.maximum(light.max(axis=-1), 1e-4)
    display = (light * (gain / SDR_WHITE_NITS)[..., None]) @ _BT2020_TO_BT709.T
    return np.rint(255 * np.clip(display, 0, 1) ** np.float32(1 / _DISPLAY_GAMMA)).astype(np.uint8)


@lru_cache(maxsize=2)
def _linear_table(transfer: Transfer) -> np.ndarray:
    """Light for every 16-bit code: nits for PQ, scene light 0..1 for HLG."""
    code = np.arange(65536, dtype=np.float64) / 65535
    if transfer == "pq":
        return _pq_to_nits(code).astype(np.float32)
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - _HLG_C) / _HLG_A) + _HLG_B) / 12).astype(
        np.float32
    )


def _pq_to_nits(code: np.ndarray) -> np.ndarray:
    power = code ** (1 / _PQ_M2)
    return 10_000 * (np.maximum(power - _PQ_C1, 0) / (_PQ_C2 - _PQ_C3 * power)) ** (1 / _PQ_M1)


def _nits_to_pq(nits: np.ndarray) -> np.ndarray:
    power = (nits / 10_000) ** _PQ_M1
    return ((_PQ_C1 + _PQ_C2 * power) / (1 + _PQ_C3 * power)) ** _PQ_M2


@lru_cache(maxsize=1)
def _compression_table() -> tuple[np.ndarray, np.ndarray]:
    """BT.2390 curve from 0..1000 to 0..203 nits as (nits in, nits out), dense in PQ so that it may be interpolated."""
    source = float(_nits_to_pq(np.array(HDR_PEAK_NITS)))
    target = float(_nits_to_pq(np.array(SDR_WHITE_NITS))) / source
    knee = 1.5 * target - 0.5
    e = np.linspace(0, 1, 4096)
    t = np.clip((e - knee) / (1 - knee), 0, 1)
    hermite = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (-2 * t**3 + 3 * t**2) * target
    )
    return _pq_to_nits(e * source), _pq_to_nits(np.where(e < knee, e, hermite) * source)


def _compressed_nits(nits: np.ndarray) -> np.ndarray:
    return np.interp(nits, *_compression_table()).astype(np.float32)
