"""In which arithmetic a run computes: parameters and optimizer stay fp32, products are made in what autocast gives them."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_dtype(name: str, device: torch.device) -> str:
    """The word that dtype=auto means on a device: bf16 where the hardware has it, else fp16, and fp32 on a CPU."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def autocast(name: str, device: torch.device) -> torch.autocast:
    """The context in which a forward is made in a dtype; its backward follows it by itself."""
    dtype = DTYPES[choose_dtype(name, device)]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def make_scaler(name: str, device: torch.device) -> torch.amp.GradScaler:
    """fp16 has no gradients below 6e-8: the loss is scaled up before the backward; other dtypes need none of it."""
    return torch.amp.GradScaler(device.type, enabled=name == "fp16")


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on the device; a GPU copies from pinned memory while the host goes on."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
