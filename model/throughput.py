"""How near a run comes to its device's roof.

MFU is tokens per second times the FLOPs of a token, over the device's peak in the run's dtype. The FLOPs are those of the
matrix products of forward and backward, counted once however often an implementation makes them (gptkernels/cost.py): 6
for each weight of a product, and 7 L C T for causal attention; of 124M GPT-2 that is within 1 % of 6 N + 6 L C T.
"""

from __future__ import annotations

import re

import torch

from gptkernels.cost import training_step
from model.config import Config

# Dense TFLOP/s with fp32 accumulation, from the vendor's data sheets: for bf16 and fp16, for tf32, for fp32. The first
# pattern that the device's name begins with counts.
PEAKS = {
    r"NVIDIA H100 PCIe\b": (756.0, 378.0, 51.0),
    r"NVIDIA H[12]00 NVL\b": (835.0, 417.0, 60.0),
    r"NVIDIA (H100|H200|GH200)\b": (989.0, 494.0, 67.0),
    r"NVIDIA B200\b": (2250.0, 1125.0, 75.0),
    r"NVIDIA A100\b": (312.0, 156.0, 19.5),
    r"NVIDIA A10G$": (70.0, 35.0, 35.0),
    r"NVIDIA L40S$": (362.0, 183.0, 91.6),
    r"NVIDIA L4$": (121.0, 60.0, 30.3),
    r"NVIDIA GeForce RTX 4090$": (165.2, 82.6, 82.6),
    r"NVIDIA GeForce RTX 3090$": (71.0, 35.6, 35.6),
}


def peak_flops(device: torch.device, dtype: str, tf32: bool) -> float | None:
    """FLOP/s that the device can do at most in the dtype; None where no data sheet is known."""
    return named_peak(torch.cuda.get_device_name(device), dtype, tf32) if device.type == "cuda" else None


def named_peak(name: str, dtype: str, tf32: bool) -> float | None:
    """FLOP/s of a device by its name; None for one that the table lacks."""
    found = next((peaks for pattern, peaks in PEAKS.items() if re.match(pattern, name)), None)
    if found is None or " MIG " in name:  # a part of a device
        return None
    half, tensor_float, single = found
    return 1e12 * (half if dtype in ("bf16", "fp16") else tensor_float if tf32 else single)


def flops_a_token(config: Config) -> int:
    """FLOPs of a token's forward and backward."""
    m = config.model
    step = training_step(m.n_layer, m.n_head, m.n_embd, m.vocab_size, 1, m.context, dtype_bytes=4).both
    return step.flops // m.context
