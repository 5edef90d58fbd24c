"""What runs the programs of an artifact: AOTInductor, ONNX Runtime, TensorRT. :class:`.Runner` is on top of these."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .artifact import ArtifactError, target
from .driver import Driver, DriverError
from .engine import DeviceArray, Engine, EngineError
from .program import BATCH
from .sealed import Manifest

__all__ = ["PROVIDERS", "AOTInductor", "Backend", "ONNXRuntime", "TensorRT"]

PROVIDERS = ("CPUExecutionProvider", "CUDAExecutionProvider", "NvTensorRTRTXExecutionProvider")  # of ONNX Runtime
CPU_CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")  # each runs what was compiled for those before it
ONNX_DTYPES = {"float32": 1, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11, "bfloat16": 16}


class Backend(Protocol):
    """Both programs of an artifact; a state is whatever the backend keeps it in."""

    device: torch.device
    """Where tokens are wanted and logits are returned."""

    def start(self, batch: int) -> Any:
        """The state of ``batch`` sequences before the first token."""

    def __call__(self, name: str, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Run "prefill" or "step" on contiguous tokens on ``device``: logits and the new state. The old one is lost."""


def _shape(entry: dict[str, Any], batch: int) -> tuple[int, ...]:
    return tuple(batch if size == BATCH else size for size in entry["shape"])


def _zeros(entry: dict[str, Any], batch: int, device: torch.device) -> Tensor:
    return _empty(entry, batch, device).zero_()


def _empty(entry: dict[str, Any], batch: int, device: torch.device) -> Tensor:
    return torch.empty(_shape(entry, batch), dtype=getattr(torch, entry["dtype"]), device=device)


class _PingPong:
    """Two sets of buffers for a state: a run reads one and writes the other, and nothing is copied."""

    def __init__(self, entries: Sequence[dict[str, Any]], allocate: Callable[[dict[str, Any], int], Any]) -> None:
        self._entries, self._allocate = entries, allocate
        self._sets: list[list[Any]] = []

    def start(self, batch: int) -> list[Any]:
        self._sets = [[self._allocate(entry, batch) for entry in self._entries] for _ in range(2)]
        return self._sets[0]

    def other(self, state: list[Any]) -> list[Any]:
        return self._sets[1] if state is self._sets[0] else self._sets[0]


# --- AOTInductor -----------------------------------------------------------------------------------------------------------


class AOTInductor:
    """``.pt2`` packages: shared libraries that torch loads."""

    def __init__(self, folder: Path, manifest: Manifest, device: str | None) -> None:
        device = manifest["device"] if device is None else device
        if device != manifest["device"]:
            raise ValueError(f"device: expected {manifest['device']}, which {folder} was compiled for, got {device}")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device: expected a GPU for {folder}, which was compiled for cuda, got a machine without one")
        if not _runs(manifest["target"], target(device)):
            raise ArtifactError(f"{folder}: expected code for {target(device)}, got code for {manifest['target']}: export it here")
        self.device = torch.device(device)
        self._state = manifest["state"]
        files = manifest["backends"]["aoti"]["programs"]
        self._programs = {name: torch._inductor.aoti_load_package(str(folder / file)) for name, file in files.items()}

    def start(self, batch: int) -> list[Tensor]:
        return [_zeros(entry, batch, self.device) for entry in self._state]

    def __call__(self, name: str, tokens: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        with torch.no_grad():
            logits, *state = self._programs[name](tokens, *state)
        return logits, state


def _runs(built_for: str, here: str) -> bool:
    """Whether code for the first target runs on the second."""
    *old_kind, old = built_for.split()
    *new_kind, new = here.split()
    if old_kind != new_kind:
        return False
    if old in CPU_CAPABILITIES and new in CPU_CAPABILITIES:
        return CPU_CAPABILITIES.index(old) <= CPU_CAPABILITIES.index(new)
    return old == new


# --- ONNX Runtime ----------------------------------------------------------------------------------------------------------


class ONNXRuntime:
    """ONNX files in one of ONNX Runtime's providers, on tensors of torch that are bound where they are: nothing is copied."""

    def __init__(self, folder: Path, manifest: Manifest, device: str | None, provider: str | None) -> None:
        try:
            import onnxruntime  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError(
                'backend "onnx" needs onnxruntime, which is not installed: pip install "gka-compile[onnx]" (or [onnx-gpu])'
            ) from error
        if provider is None:
            provider = PROVIDERS[device == "cuda"]
        kind = "cpu" if provider == PROVIDERS[0] else "cuda"
        if device not in (None, kind):
            raise ValueError(f"provider: expected one for device {device}, got {provider}")
        options = onnxruntime.SessionOptions()
        # TF32 is on unless told: float32 products would keep float16's digits
        given: list[Any] = [(provider, {"use_tf32": "0"}) if provider == PROVIDERS[1] else provider]
        if provider == PROVIDERS[2]:
            options.add_provider_for_devices(_plugin_devices(onnxruntime), {})
            given = []
        elif provider not in (available := onnxruntime.get_available_providers()):
            raise ValueError(
                f"device: expected one that onnxruntime runs on here ({', '.join(available)}), got {kind}, which needs {provider}: "
                'pip install "gka-compile[onnx-gpu]"'
            )
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device: expected a GPU that PyTorch sees, which keeps the state for {provider}, got none")
        self.device = torch.device(kind)
        self._kind = kind
        self._programs = manifest["programs"]
        self._buffers = _PingPong(manifest["state"], lambda entry, batch: _zeros(entry, batch, self.device))
        self._sessions = {}
        for name, file in manifest["backends"]["onnx"]["programs"].items():
            try:
                session = onnxruntime.InferenceSession(os.fspath(folder / file), options, providers=given or None)
            except Exception as error:  # its types have no base of their own
                raise RuntimeError(f"{folder / file}: expected a program that {provider} runs here, got {error}") from error
            self._sessions[name] = session

    def start(self, batch: int) -> list[Tensor]:
        return self._buffers.start(batch)

    def __call__(self, name: str, tokens: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        program, binding, new = self._programs[name], self._sessions[name].io_binding(), self._buffers.other(state)
        logits = _empty(program["outputs"][0], tokens.shape[0], self.device)
        for bind, entries, tensors in (
            (binding.bind_input, program["inputs"], (tokens, *state)),
            (binding.bind_output, program["outputs"], (logits, *new)),
        ):
            for entry, x in zip(entries, tensors, strict=True):
                bind(entry["name"], self._kind, 0, ONNX_DTYPES[entry["dtype"]], tuple(x.shape), x.data_ptr())
        if self._kind == "cuda":
            torch.cuda.current_stream().synchronize()  # ONNX Runtime has a stream of its own
        self._sessions[name].run_with_iobinding(binding)
        binding.synchronize_outputs()
        return logits, new


def _plugin_devices(onnxruntime: Any) -> list[Any]:
    """The GPUs of the TensorRT-RTX provider, a plugin in a package of its own."""
    provider = PROVIDERS[2]
    try:
        import onnxruntime_ep_nv_tensorrt_rtx as plugin  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError(f"provider {provider} needs a plugin: pip install onnxruntime-ep-nv-tensorrt-rtx") from error
    devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == provider]
    if not devices:
        try:
            onnxruntime.register_execution_provider_library(provider, plugin.get_library_path())
        except Exception as error:  # of a type that ONNX Runtime does not export
            raise ValueError(
                f"provider: expected a machine that {provider} runs on, got one where it does not load: {error}"
            ) from None
        devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == provider]
    if not devices:
        raise ValueError(f"provider: expected a GPU that {provider} supports (compute capability 7.5, 8.x or 12.x), got none")
    return devices[:1]


# --- TensorRT --------------------------------------------------------------------------------------------------------------


class TensorRT:
    """Engines of TensorRT or TensorRT-RTX; states stay in the GPU's memory, in torch's or, where torch has no GPU, our own."""

    def __init__(self, folder: Path, manifest: Manifest, device: str | None) -> None:
        if device == "cpu":
            raise ValueError("device: expected cuda or None for backend tensorrt, got cpu")
        try:
            self._driver = Driver()
            files = manifest["backends"]["tensorrt"]["programs"]
            self._engines = {name: Engine(folder / file, self._driver) for name, file in files.items()}
        except DriverError as error:
            raise ValueError(f"device: expected a GPU for backend tensorrt, got a machine without one: {error}") from None
        except EngineError as error:
            raise ArtifactError(str(error)) from None
        self._in_torch = torch.cuda.is_available()
        self.device = torch.device("cuda" if self._in_torch else "cpu")
        self._state = [x["name"] for x in manifest["state"]]
        # as the engines have them: TensorRT 8 has no int64
        self._buffers = _PingPong(self._engines["step"].manifest["inputs"][1:], self._allocate)

    def _allocate(self, entry: dict[str, Any], batch: int) -> Tensor | DeviceArray:
        if self._in_torch:
            return _zeros(entry, batch, self.device)
        return DeviceArray(self._driver, _shape(entry, batch), entry["dtype"])

    def start(self, batch: int) -> list[Any]:
        return self._buffers.start(batch)

    def __call__(self, name: str, tokens: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        engine, new = self._engines[name], self._buffers.other(state)
        first, last = engine.manifest["inputs"][0], engine.manifest["outputs"][0]
        logits = _empty(last, tokens.shape[0], self.device)
        if self._in_torch:
            self._driver.stream = torch.cuda.current_stream().cuda_stream
        outputs = [x["name"] for x in engine.manifest["outputs"]]
        engine(
            {first["name"]: tokens.to(getattr(torch, first["dtype"])), **dict(zip(self._state, state, strict=True))},
            dict(zip(outputs, (logits, *new), strict=True)),
        )
        return logits, new
