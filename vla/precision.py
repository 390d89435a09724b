"""Where the towers compute in bfloat16: only on hardware that multiplies it; emulated, its products are far slower than float32."""

import torch


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for products in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    can = torch.cpu.get_capabilities()
    return any(can.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))  # the last is ARM's name


def chosen_precision(wanted: str) -> str:
    """Either "no" or "bf16"; "auto" is bf16 where this machine multiplies it."""
    if wanted != "auto":
        return wanted
    return "bf16" if multiplies_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")) else "no"
