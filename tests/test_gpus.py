"""The table of peak rates: names as drivers give them."""

from __future__ import annotations

import pytest
import torch

from persona.gpus import PEAKS, peak, precision_of


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),  # another chip under nearly the same name
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Tesla V100-SXM2-32GB", None),  # has no bf16
        ("cpu", None),
    ],
)
def test_names_of_drivers(name, rate):
    assert peak(name, "bf16") == rate


def test_precisions():
    assert peak("Tesla V100-PCIE-16GB", "fp32") == 14e12 and peak("Tesla V100-SXM2-32GB", "fp32") == 15.7e12
    assert peak("NVIDIA A100-SXM4-80GB", precision_of(torch.float32)) == 19.5e12
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert peak("NVIDIA A100-SXM4-80GB", precision_of(torch.float32)) == 156e12
    finally:
        torch.set_float32_matmul_precision(before)
    assert precision_of(torch.bfloat16) == "bf16"
    for rates in PEAKS.values():  # tensor cores are never slower
        assert rates.fp32 <= (rates.tf32 or rates.fp32) <= (rates.bf16 or rates.fp32)
