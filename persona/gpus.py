"""Peak rates of GPUs by the name that the driver gives: floating-point operations a second, as the makers state them.

Dense rates, without the doubling for sparse weights that data sheets print. A GPU that is not in the table has no
rate: no utilisation and no time is made up for it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """10^12 operations a second: `bf16` (also fp16) and `tf32` on tensor cores with sums in fp32, `fp32` without."""

    bf16: float | None
    tf32: float | None
    fp32: float


# What stands in the driver's name → rates, from NVIDIA's data sheets (RTX: its Ampere and Ada whitepapers). The first
# that fits counts: variants with rates of their own come before their family.
PEAKS: dict[str, Peak] = {
    "B200": Peak(2250, 1125, 75),
    "H200 NVL": Peak(835, 417, 60),
    "H200": Peak(989, 494, 67),
    "GH200": Peak(989, 494, 67),
    "H100 NVL": Peak(835, 417, 60),
    "H100 PCIe": Peak(756, 378, 51),
    "H100": Peak(989, 494, 67),
    "H800": Peak(989, 494, 67),
    "H20": Peak(148, 74, 44),
    "A100": Peak(312, 156, 19.5),
    "A800": Peak(312, 156, 19.5),
    "A40": Peak(149.7, 74.8, 37.4),
    "A10": Peak(125, 62.5, 31.2),
    "RTX A6000": Peak(154.8, 77.4, 38.7),
    "L40S": Peak(362, 183, 91.6),
    "L40": Peak(181, 90.5, 90.5),
    "L4": Peak(121, 60, 30.3),
    "V100-PCIE": Peak(None, None, 14),
    "V100": Peak(None, None, 15.7),
    "T4": Peak(None, None, 8.1),
    "RTX 4090": Peak(165.2, 82.6, 82.6),
    "RTX 3090": Peak(71, 35.6, 35.6),
}


def peak(name: str, precision: str) -> float | None:
    """Operations a second of the GPU that the driver calls `name` ("NVIDIA H100 80GB HBM3") in `precision` ("bf16",
    "tf32" or "fp32"). None where the table does not know, and for a slice of a GPU (MIG)."""
    if "MIG" in name:
        return None
    for part, rates in PEAKS.items():
        if re.search(rf"(?<!\w){re.escape(part)}(?!\w| Ti| D\b| Laptop)", name):
            rate: float | None = getattr(rates, precision)
            return None if rate is None else rate * 1e12
    return None


def precision_of(dtype: torch.dtype) -> str:
    """In what matrices of `dtype` are multiplied, as `peak` calls it."""
    if dtype in (torch.bfloat16, torch.float16):
        return "bf16"
    return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
