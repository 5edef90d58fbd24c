"""A TensorRT engine, loaded: buffers of torch or NumPy in, buffers out, with whichever of the two libraries built it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .driver import Driver
from .to_tensorrt import FORMAT, PACKAGES, VERSION, library_of, logger

__all__ = ["DeviceArray", "Engine", "EngineError"]


class EngineError(ValueError):
    """An engine that is not whole, or not for this machine's library or GPU."""


class DeviceArray:
    """A contiguous array of zeros in the GPU's memory, freed with it. For where torch does not see the GPU."""

    def __init__(self, driver: Driver, shape: tuple[int, ...], dtype: str) -> None:
        self.driver, self.shape, self.dtype = driver, shape, dtype
        self.nbytes = math.prod(shape) * getattr(torch, dtype).itemsize
        self.pointer = driver.allocate(self.nbytes)
        driver.clear(self.pointer, self.nbytes)

    def __del__(self) -> None:
        if hasattr(self, "pointer"):
            self.driver.free(self.pointer)


Buffer = Tensor | np.ndarray[Any, Any] | DeviceArray


class Engine:
    """An engine file and the manifest beside it, as :func:`.to_tensorrt` writes them.

    Args:
        path: the engine file.
        driver: of the GPU to run on; None: a new one.

    Raises:
        EngineError: a file is absent, truncated or changed, or the engine was built by another version, or for other GPUs.
        ImportError: the library that built it is not installed.
        DriverError: there is no GPU.
    """

    def __init__(self, path: str | Path, driver: Driver | None = None) -> None:
        path = Path(path)
        self.manifest, plan = _read(path)
        flavour, capabilities = self.manifest["flavour"], self.manifest["compute_capabilities"]
        library = library_of(flavour)
        if library.__version__ != self.manifest["library_version"]:
            raise EngineError(
                f"{path}: expected an engine of {PACKAGES[flavour]} {library.__version__}, which is installed, got one of "
                f"{self.manifest['library_version']}: build it again, or install that version"
            )
        self._driver = Driver() if driver is None else driver
        if self._driver.capability not in capabilities:
            raise EngineError(
                f"{path}: expected an engine for compute capability {self._driver.capability}, this GPU's, got one for "
                f"{', '.join(capabilities)}: build it for this GPU"
            )
        logger(library).told.clear()
        self._runtime = library.Runtime(logger(library))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(f"{path}: expected an engine that loads here, got none: {logger(library).error()}")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise EngineError(f"{path}: expected an engine that fits the GPU, got none: {logger(library).error()}")

    def check(self, inputs: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError where the shape of an input is outside the profile that the engine was built with."""
        for x in self.manifest["inputs"]:
            shape, least, most = inputs[x["name"]], x["profile"]["least"], x["profile"]["most"]
            if len(shape) != len(least) or not all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True)):
                bounds = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(least, most, strict=True))
                raise ValueError(f"{x['name']}: expected a shape [{bounds}], the engine's profile, got {list(shape)}")

    def __call__(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Run once: read every input, write every output.

        Args:
            inputs, outputs: contiguous, one of each name in the manifest, of its dtype. Torch tensors on the GPU and
                :class:`DeviceArray` are used where they are; torch tensors on the CPU and NumPy arrays are copied, and outputs in
                them are complete on return. No buffer may be both.

        Raises:
            TypeError, ValueError: naming the buffer, what was expected and what came.
            RuntimeError: TensorRT could not run.
        """
        for described, given in ((self.manifest["inputs"], inputs), (self.manifest["outputs"], outputs)):
            names = [x["name"] for x in described]
            if set(names) != set(given):
                raise ValueError(f"buffers: expected {', '.join(names)}, got {', '.join(given)}")
            for x in described:
                _check_buffer(x["name"], given[x["name"]], x["dtype"])
        self.check({name: tuple(buffer.shape) for name, buffer in inputs.items()})
        driver, staged, downloads = self._driver, [], []
        for name, buffer in inputs.items():
            self._context.set_input_shape(name, tuple(buffer.shape))
            address = _device_address(buffer)
            if address is None:
                staged.append(copy := DeviceArray(driver, tuple(buffer.shape), _dtype(buffer)))
                address = copy.pointer
                driver.upload(address, _host_address(buffer), copy.nbytes)
            self._context.set_tensor_address(name, address)
        for name, buffer in outputs.items():
            expected = tuple(self._context.get_tensor_shape(name))
            if expected != tuple(buffer.shape):
                raise ValueError(f"{name}: expected a buffer of shape {list(expected)}, got {list(buffer.shape)}")
            address = _device_address(buffer)
            if address is None:
                staged.append(copy := DeviceArray(driver, expected, _dtype(buffer)))
                address = copy.pointer
                downloads.append((_host_address(buffer), copy))
            self._context.set_tensor_address(name, address)
        if not self._context.execute_async_v3(driver.stream):
            raise RuntimeError(f"TensorRT: expected a run, got none: {logger(library_of(self.manifest['flavour'])).error()}")
        for host, copy in downloads:
            driver.download(host, copy.pointer, copy.nbytes)
        if staged:
            driver.synchronize()


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    beside = path.with_name(path.name + ".json")
    for file in (path, beside):
        if not file.is_file():
            raise EngineError(f"{path}: expected an engine and its manifest {beside.name}, got no {file.name}")
    try:
        manifest = json.loads(beside.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EngineError(f"{beside}: expected an engine's manifest, got no JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise EngineError(f"{beside}: expected a {FORMAT} of version {VERSION}, got JSON of another kind: build it again")
    plan = path.read_bytes()
    if hashlib.sha256(plan).hexdigest() != manifest["sha256"]:
        raise EngineError(f"{path}: expected the SHA-256 that {beside.name} lists, got another: truncated, changed or replaced")
    return manifest, plan


# --- buffers ---------------------------------------------------------------------------------------------------------------


def _dtype(buffer: Buffer) -> str:
    return str(buffer.dtype).removeprefix("torch.")


def _check_buffer(name: str, buffer: Any, dtype: str) -> None:
    if not isinstance(buffer, (Tensor, np.ndarray, DeviceArray)):
        raise TypeError(f"{name}: expected a Tensor, an ndarray or a DeviceArray, got {type(buffer).__name__}")
    if _dtype(buffer) != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {_dtype(buffer)}")
    if isinstance(buffer, Tensor):
        contiguous, strides = buffer.is_contiguous(), buffer.stride()
    else:
        contiguous, strides = isinstance(buffer, DeviceArray) or bool(buffer.flags.c_contiguous), getattr(buffer, "strides", ())
    if not contiguous:
        raise ValueError(f"{name}: expected a contiguous buffer, got strides {strides}")


def _device_address(buffer: Buffer) -> int | None:
    """Where it is on the GPU, or None where it is on the host."""
    if isinstance(buffer, DeviceArray):
        return buffer.pointer
    return buffer.data_ptr() if isinstance(buffer, Tensor) and buffer.is_cuda else None


def _host_address(buffer: Buffer) -> int:
    assert not isinstance(buffer, DeviceArray)
    return buffer.data_ptr() if isinstance(buffer, Tensor) else buffer.ctypes.data
