"""Run an artifact in a process of its own and write down what it says: ``python -m gka_compile._replay FOLDER BACKEND IN OUT``.

IN and OUT are .npz files: ``prompt`` [1, T] and ``continuation`` [1, n] in; ``logits`` [n, vocab] along the continuation, greedy
``tokens`` [1, n] and ``seconds`` of generating them out.  The demo compares these with the model's own; nothing here imports it.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from .export import Runner


def main(folder: str, backend: str, source: str, destination: str) -> None:
    runner = Runner.load(folder, backend)
    given = np.load(source)
    prompt, continuation = torch.from_numpy(given["prompt"]), torch.from_numpy(given["continuation"])
    logits = [runner.prefill(prompt)]
    logits += [runner.step(continuation[:, i]) for i in range(continuation.shape[1] - 1)]
    start = time.perf_counter()
    tokens = runner.generate(prompt, continuation.shape[1])
    seconds = time.perf_counter() - start
    np.savez(destination, logits=torch.cat(logits).cpu().numpy(), tokens=tokens.cpu().numpy(), seconds=seconds)
    model_code = [name for name in sys.modules if name.startswith(("gka_compile.model", "gka_compile.layer"))]
    if model_code:
        raise RuntimeError(f"expected a process without the model's code, got {', '.join(model_code)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
