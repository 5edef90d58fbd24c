"""Running an artifact, without the Python code of the model that it was made from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gka_compile.tokens import check_tokens, choose

from .artifact import BACKENDS, ArtifactError, Manifest, load_manifest, target
from .program import BATCH

__all__ = ["Runner"]


class _Engine(Protocol):
    """One program of one backend: (tokens, *state) to (logits, *new state), on ``device``."""

    def __call__(self, name: str, inputs: Sequence[Tensor]) -> Sequence[Tensor]: ...


class Runner:
    """A language model that generates from an artifact; make one with :meth:`load`.

    It holds the state of B sequences: :meth:`prefill` and :meth:`step` advance it, :meth:`reset` forgets it, and the first call
    after that fixes B anew.  Tokens are int64 tensors; they may be on any device, results are on ``device``.
    """

    def __init__(self, manifest: Manifest, backend: str, engine: _Engine, device: torch.device) -> None:
        self.manifest = manifest
        self.backend = backend
        self.device = device
        self.vocab_size: int = manifest["model"]["vocab_size"]
        self.max_length: int | None = manifest["model"]["max_length"]
        """Most tokens that a sequence may have; None: no limit."""
        self._engine = engine
        self.reset()

    @classmethod
    def load(cls, folder: str | Path, backend: str = "aoti", device: str | None = None) -> Runner:
        """Check the artifact in ``folder`` and load one of its backends.

        Args:
            backend: "aoti" or "onnx".
            device: "cpu" or "cuda" for "onnx" (None: "cpu"); "aoti" runs on what it was compiled for.

        Raises:
            ArtifactError: the artifact is damaged, of another format version, without that backend, or compiled for other hardware.
            ImportError: onnxruntime is absent.
            ValueError: unknown backend or device, or a device that the backend cannot run on here.
        """
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
        if device not in (None, "cpu", "cuda"):
            raise ValueError(f"device: expected cpu, cuda or None, got {device!r}")
        folder = Path(folder)
        manifest = load_manifest(folder)
        if backend not in manifest["backends"]:
            raise ArtifactError(f"{folder}: expected the backend {backend}, got an artifact with {', '.join(manifest['backends'])}")
        if device is None:
            device = manifest["device"] if backend == "aoti" else "cpu"
        if backend == "aoti":
            engine: _Engine = _AOTInductor(folder, manifest, device)
        else:
            engine = _ONNXRuntime(folder, manifest, device)
        return cls(manifest, backend, engine, torch.device(device))

    def reset(self) -> None:
        """Forget the state."""
        self._state: list[Tensor] = []
        self._length = 0

    def prefill(self, tokens: Tensor) -> Tensor:
        """Consume [B, T] tokens, T ≥ 1, after what came before: logits [B, vocab_size] after the last one.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        return self._advance("prefill", check_tokens("tokens", tokens, "[B,T]"))

    def step(self, tokens: Tensor) -> Tensor:
        """Consume one token of each sequence, [B]: logits [B, vocab_size] after it.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        return self._advance("step", check_tokens("tokens", tokens, "[B]"))

    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Start anew and continue [B, T] tokens, T ≥ 1, by max_new_tokens.

        Args:
            temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
            generator: source of the draws, on ``device``; None: torch's global one.

        Returns:
            The new tokens [B, max_new_tokens].

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        check_tokens("prompt", prompt, "[B,T]")
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
            raise TypeError(f"max_new_tokens: expected an int, got {type(max_new_tokens).__name__}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature: expected a number that is not negative, got {temperature}")
        self._check_room("max_new_tokens", prompt.shape[1] + max_new_tokens - 1)
        self.reset()
        logits = self._advance("prefill", prompt, "prompt")
        tokens = [choose(logits, temperature, generator)]
        while len(tokens) < max_new_tokens:
            logits = self._advance("step", tokens[-1])
            tokens.append(choose(logits, temperature, generator))
        return torch.stack(tokens, 1)

    def _advance(self, name: str, tokens: Tensor, argument: str = "tokens") -> Tensor:
        least, most = int(tokens.min()), int(tokens.max())
        if least < 0 or most >= self.vocab_size:
            raise ValueError(f"{argument}: expected tokens from 0 to {self.vocab_size - 1}, got {least} to {most}")
        length = self._length + (tokens.shape[1] if name == "prefill" else 1)
        self._check_room(argument, length)
        batch = tokens.shape[0]
        state = self._state or [self._zeros(entry, batch) for entry in self.manifest["state"]]
        if state[0].shape[0] != batch:
            raise ValueError(
                f"{argument}: expected the {state[0].shape[0]} sequences of the state, got {batch}; reset() starts anew"
            )
        logits, *self._state = self._engine(name, [tokens.to(self.device).contiguous(), *state])
        self._length = length
        return logits

    def _zeros(self, entry: dict[str, Any], batch: int) -> Tensor:
        shape = [batch if size == BATCH else size for size in entry["shape"]]
        return torch.zeros(shape, dtype=getattr(torch, entry["dtype"]), device=self.device)

    def _check_room(self, argument: str, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"{argument}: expected to consume at most max_length = {self.max_length} tokens, got {length}")


# --- backends --------------------------------------------------------------------------------------------------------------

CPU_CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")  # each runs what was compiled for those before it


class _AOTInductor:
    """``.pt2`` packages: shared libraries that torch loads."""

    def __init__(self, folder: Path, manifest: Manifest, device: str) -> None:
        if device != manifest["device"]:
            raise ValueError(f"device: expected {manifest['device']}, which {folder} was compiled for, got {device}")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device: expected a GPU for {folder}, which was compiled for cuda, got a machine without one")
        if not _runs(manifest["target"], target(device)):
            raise ArtifactError(f"{folder}: expected code for {target(device)}, got code for {manifest['target']}: export it here")
        files = manifest["backends"]["aoti"]["programs"]
        self._programs = {name: torch._inductor.aoti_load_package(str(folder / file)) for name, file in files.items()}

    def __call__(self, name: str, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return self._programs[name](*inputs)  # type: ignore[no-any-return]


def _runs(built_for: str, here: str) -> bool:
    """Whether code for the first target runs on the second."""
    *old_kind, old = built_for.split()
    *new_kind, new = here.split()
    if old_kind != new_kind:
        return False
    if old in CPU_CAPABILITIES and new in CPU_CAPABILITIES:
        return CPU_CAPABILITIES.index(old) <= CPU_CAPABILITIES.index(new)
    return old == new


class _ONNXRuntime:
    """ONNX files in ONNX Runtime's own CPU or CUDA kernels; on CUDA tensors travel through the host at every call."""

    def __init__(self, folder: Path, manifest: Manifest, device: str) -> None:
        try:
            import onnxruntime  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError(
                'backend "onnx" needs onnxruntime, which is not installed: pip install "gka-compile[onnx]" (or [onnx-gpu])'
            ) from error
        provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise ValueError(
                f"device: expected one that onnxruntime runs on here ({', '.join(available)}), got {device}: "
                'pip install "gka-compile[onnx-gpu]"'
            )
        files = manifest["backends"]["onnx"]["programs"]
        self._device = torch.device(device)
        self._names = {name: [x["name"] for x in p["inputs"]] for name, p in manifest["programs"].items()}
        self._sessions = {
            name: onnxruntime.InferenceSession(os.fspath(folder / file), providers=[provider]) for name, file in files.items()
        }

    def __call__(self, name: str, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        feed = {key: x.cpu().numpy() for key, x in zip(self._names[name], inputs, strict=True)}
        return [torch.from_numpy(x).to(self._device) for x in self._sessions[name].run(None, feed)]
