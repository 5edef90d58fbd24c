"""Running an artifact, without the Python code of the model that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gka_compile.tokens import check_sampling, check_tokens, choose

from .artifact import BACKENDS, ArtifactError, load_manifest
from .backends import PROVIDERS, AOTInductor, Backend, ONNXRuntime, TensorRT
from .sealed import Manifest

__all__ = ["Runner"]


class Runner:
    """A language model that generates from an artifact; make one with :meth:`load`.

    It holds the state of B sequences: :meth:`prefill` and :meth:`step` advance it, :meth:`reset` forgets it, and the first call
    after that fixes B anew.  Tokens are int64 tensors; they may be on any device, results are on ``device``.
    """

    def __init__(self, manifest: Manifest, name: str, backend: Backend) -> None:
        self.manifest = manifest
        self.backend = name
        self.device = backend.device
        self.vocab_size: int = manifest["model"]["vocab_size"]
        self.max_length: int | None = manifest["model"]["max_length"]
        """Most tokens that a sequence may have; None: no limit."""
        self._backend = backend
        self.reset()

    @classmethod
    def load(cls, folder: str | Path, backend: str = "aoti", device: str | None = None, provider: str | None = None) -> Runner:
        """Check the artifact in ``folder`` and load one of its backends.

        Args:
            backend: "aoti", "onnx" or "tensorrt".
            device: "cpu" or "cuda"; None: for "aoti" what it was compiled for, for "onnx" what ``provider`` runs on, else the CPU.
                "tensorrt" runs on a GPU.
            provider: of ONNX Runtime, "CPUExecutionProvider", "CUDAExecutionProvider" or "NvTensorRTRTXExecutionProvider"; None:
                the first of ``device``.

        Raises:
            ArtifactError: the artifact is damaged, of another format version, without that backend, or compiled for other hardware
                or another version of TensorRT.
            ImportError: onnxruntime, or the library that built the engines, is absent.
            ValueError: unknown backend, device or provider, or one that cannot run here.
        """
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
        if device not in (None, "cpu", "cuda"):
            raise ValueError(f"device: expected cpu, cuda or None, got {device!r}")
        if provider is not None and (backend != "onnx" or provider not in PROVIDERS):
            raise ValueError(f"provider: expected None, or for backend onnx one of {', '.join(PROVIDERS)}, got {provider!r}")
        folder = Path(folder)
        manifest = load_manifest(folder)
        if backend not in manifest["backends"]:
            raise ArtifactError(f"{folder}: expected the backend {backend}, got an artifact with {', '.join(manifest['backends'])}")
        if backend == "onnx":
            return cls(manifest, backend, ONNXRuntime(folder, manifest, device, provider))
        return cls(manifest, backend, (AOTInductor if backend == "aoti" else TensorRT)(folder, manifest, device))

    def reset(self) -> None:
        """Forget the state."""
        self._state: Any = None
        self._batch = 0
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
        check_sampling(temperature, generator)
        self._check_room("prompt", prompt.shape[1])
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
        state = self._backend.start(batch) if self._state is None else self._state
        if self._state is not None and batch != self._batch:
            raise ValueError(f"{argument}: expected the {self._batch} sequences of the state, got {batch}; reset() starts anew")
        logits, self._state = self._backend(name, tokens.to(self.device).contiguous(), state)
        self._length, self._batch = length, batch
        return logits

    def _check_room(self, argument: str, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"{argument}: expected to consume at most max_length = {self.max_length} tokens, got {length}")
