"""What a device can do and how it is asked, one file per kind. Every rank; imports torch only."""

from __future__ import annotations

from autotp_serving.devices.base import Device, DeviceError

__all__ = ["Device", "DeviceError", "open_device"]


def open_device(name: str, local_rank: int) -> Device:
    """Open the device that rank `local_rank` of this host works on.

    Args:
        name: cpu, cuda, xpu, or auto for the first of xpu, cuda, cpu that is there.

    Raises:
        DeviceError: the device is not there, or this host has fewer of them than ranks.
    """
    from autotp_serving.devices.cpu import CpuDevice
    from autotp_serving.devices.cuda import CudaDevice
    from autotp_serving.devices.xpu import XpuDevice

    kinds = {"xpu": XpuDevice, "cuda": CudaDevice, "cpu": CpuDevice}
    if name == "auto":
        name = next(kind for kind, device in kinds.items() if device.is_present())
    return kinds[name](local_rank)
