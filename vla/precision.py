"""Where the towers compute in bfloat16: only on hardware where its products are faster than those of float32.

Emulated ones are far slower. AVX-512 has instructions for them: on an AMD of the fifth generation a training step takes two thirds of the time with them,
on a Xeon whose AMX is switched off one and a half times as long.
"""

import torch


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    can = torch.cpu.get_capabilities()
    if can.get("avx512_bf16", False) and str(can.get("cpu_name", "")).startswith("AMD"):
        return True
    return any(can.get(name, False) for name in ("amx_bf16", "bf16"))  # the last is ARM's name


def chosen_precision(wanted: str) -> str:
    """Either "no" or "bf16"; "auto" is bf16 where this machine multiplies it."""
    if wanted != "auto":
        return wanted
    return "bf16" if multiplies_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")) else "no"
