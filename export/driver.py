"""The few calls of the CUDA driver that running an engine takes: whatever torch is installed, and where none of it sees the GPU."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

__all__ = ["Driver", "DriverError"]

COMPUTE_CAPABILITY = (75, 76)  # attributes: major, minor


class DriverError(RuntimeError):
    """No driver, no GPU, or a call that failed."""


class Driver:
    """Memory and a stream on the first GPU, in the primary context, which the CUDA runtime, torch and TensorRT share.

    Raises:
        DriverError: there is no driver, or it finds no GPU.
    """

    def __init__(self) -> None:
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        try:
            self._library = ctypes.CDLL(name)
        except OSError:
            raise DriverError(f"CUDA: expected a machine with an NVIDIA GPU and its driver, got one without {name}") from None
        self("Init", 0)
        self._device = ctypes.c_int()
        self("DeviceGet", ctypes.byref(self._device), 0)
        self._context = ctypes.c_void_p()
        self("DevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self("CtxSetCurrent", self._context)
        stream = ctypes.c_void_p()
        self("StreamCreate", ctypes.byref(stream), 1)  # does not wait for the default stream
        self.stream: int = stream.value or 0
        """Handle of the stream on which everything runs; may be set to another, say torch's."""

    def __call__(self, name: str, *args: Any) -> None:
        code = getattr(self._library, f"cu{name}")(*args)
        if code:
            raise DriverError(f"CUDA: cu{name} failed with error {code}")

    @property
    def capability(self) -> str:
        """Compute capability of the GPU, such as "8.9"."""
        parts = [ctypes.c_int() for _ in COMPUTE_CAPABILITY]
        for part, attribute in zip(parts, COMPUTE_CAPABILITY, strict=True):
            self("DeviceGetAttribute", ctypes.byref(part), attribute, self._device)
        return ".".join(str(part.value) for part in parts)

    def allocate(self, nbytes: int) -> int:
        """Device memory, uninitialised: its address."""
        pointer = ctypes.c_uint64()
        self("MemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(nbytes, 1)))
        return pointer.value

    def free(self, pointer: int) -> None:
        self("MemFree_v2", ctypes.c_uint64(pointer))

    def clear(self, pointer: int, nbytes: int) -> None:
        """Zero it."""
        self("MemsetD8Async", ctypes.c_uint64(pointer), ctypes.c_ubyte(0), ctypes.c_size_t(nbytes), self._handle)

    def upload(self, pointer: int, host: int, nbytes: int) -> None:
        """Copy from an address of the host, whose memory may change after :meth:`synchronize`."""
        self("MemcpyHtoDAsync_v2", ctypes.c_uint64(pointer), ctypes.c_void_p(host), ctypes.c_size_t(nbytes), self._handle)

    def download(self, host: int, pointer: int, nbytes: int) -> None:
        """Copy to an address of the host, complete after :meth:`synchronize`."""
        self("MemcpyDtoHAsync_v2", ctypes.c_void_p(host), ctypes.c_uint64(pointer), ctypes.c_size_t(nbytes), self._handle)

    def synchronize(self) -> None:
        self("StreamSynchronize", self._handle)

    @property
    def _handle(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.stream)
