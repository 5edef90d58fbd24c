"""The demo: train a small GKA language model on real text, compile it, export it, and see that every form of it agrees."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .export import DEFAULT_BACKENDS, save_artifact
from .export.driver import Driver, DriverError
from .model import ByteLM, ModelConfig

__all__ = ["CONFIG", "PROMPT", "TOLERANCE", "Built", "Row", "compare", "corpus", "is_of_demo", "train"]

CONFIG = ModelConfig(hidden_size=128, intermediate_size=256, num_heads=4, num_kv_heads=2, head_dim=32, max_length=1024)
PROMPT = b'import os\n\n\ndef main(path):\n    """Return '
BATCH, LENGTH = 8, 128
TOLERANCE = 1e-3  # of a logit, in nats: what float32 on another backend may differ by; 1e-5 is usual


def corpus(most: int = 16_000_000) -> Tensor:
    """The source text of the running Python's standard library as bytes: uint8 [n], n ≤ ``most``."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts and "test" not in p.parts)
    if not files:
        raise FileNotFoundError(f"expected the standard library's source in {root}, got no .py files")
    random.Random(0).shuffle(files)
    text = bytearray()
    for path in files:
        text += path.read_bytes()
        if len(text) >= most:
            break
    return torch.frombuffer(text, dtype=torch.uint8)[:most].clone()


def is_of_demo(checkpoint: Path) -> bool:
    """Whether a checkpoint is of the demo's model, so that nothing is lost where the next one takes its place."""
    config = checkpoint / "config.json"
    try:
        return json.loads(config.read_text()) == CONFIG.to_dict()
    except (OSError, ValueError):
        return False


def _batches(text: Tensor, device: str, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        start = torch.randint(0, len(text) - LENGTH - 1, (BATCH, 1), generator=generator)
        yield text[start + torch.arange(LENGTH + 1)].long().to(device)


def train(config: ModelConfig, seconds: float, device: str = "cpu", seed: int = 0) -> tuple[ByteLM, float]:
    """Train a new model for about ``seconds``; returns it in eval mode with its last loss (nats per byte, smoothed)."""
    torch.manual_seed(seed)
    model = ByteLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    batches = _batches(corpus(), device, torch.Generator().manual_seed(seed))
    smooth, start, step = float("nan"), time.perf_counter(), 0
    shown = {"total": round(seconds), "desc": "training", "bar_format": "{desc}: {percentage:3.0f}%|{bar}|{postfix}"}
    with tqdm(**shown, mininterval=0.5 if sys.stderr.isatty() else 10) as bar:
        while (spent := time.perf_counter() - start) < seconds:
            # warm up for 5 % of the time, then anneal to a tenth
            progress = spent / seconds
            rate = 3e-3 * min(1.0, max(progress, 1 / 100) / 0.05) * (1 - 0.9 * progress)
            for group in optimizer.param_groups:
                group["lr"] = rate
            tokens = next(batches)
            logits = model(tokens[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            smooth = loss.item() if step == 1 else 0.9 * smooth + 0.1 * loss.item()
            bar.set_postfix_str(f"step {step}, {smooth:.2f} nats per byte", refresh=False)
            bar.update(min(spent, seconds) - bar.n)
        bar.update(seconds - bar.n)
    return model.eval(), smooth


@dataclass
class Row:
    """What one form of the model did."""

    name: str
    tokens: Tensor
    """[1, n] generated greedily."""
    logits: Tensor
    """[n, vocab] along the eager model's tokens."""
    tokens_per_second: float
    size: int | None
    """Bytes on disk."""
    build_seconds: float | None

    def error(self, other: Row) -> float:
        """Largest difference of a logit."""
        return (self.logits.double() - other.logits.double()).abs().max().item()

    def agrees(self, other: Row) -> bool:
        """Same tokens, and logits within TOLERANCE."""
        return torch.equal(self.tokens, other.tokens) and self.error(other) <= TOLERANCE


@dataclass
class Built:
    """A form that was built, for machines other than this one."""

    name: str
    size: int
    build_seconds: float


Advance = Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


def _run(name: str, model: ByteLM, prompt: Tensor, count: int, prefill: Advance, step: Advance, forced: Tensor | None) -> Row:
    """A form of the model that lives in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a step has little work to share, and threads that wait for each other take long on a busy machine
    start = time.perf_counter()
    model.generate(prompt, 2, prefill=prefill, step=step)  # compiles, where there is something to compile
    built = time.perf_counter() - start
    start = time.perf_counter()
    tokens = model.generate(prompt, count, prefill=prefill, step=step)
    seconds = time.perf_counter() - start
    path = tokens if forced is None else forced
    with torch.no_grad():
        found, state = prefill(prompt, model.init_state(1))
        logits = [found]
        for i in range(count - 1):
            found, state = step(path[:, i], state)
            logits.append(found)
    torch.set_num_threads(threads)
    build_seconds = None if forced is None else built
    return Row(name, tokens.cpu(), torch.cat(logits).cpu(), count / seconds, None, build_seconds)


def compare(model: ByteLM, folder: Path, count: int, say: Callable[[str], None]) -> tuple[Row, list[Row | Built]]:
    """Generate ``count`` bytes from the eager model; then from the compiled one and each backend of an artifact in ``folder``."""
    device = model.embed_tokens.weight.device
    prompt = torch.tensor([list(PROMPT)], device=device)
    say("eager")
    eager = _run("eager", model, prompt, count, model.prefill, model.step, None)
    say("compiled")
    prefill, step = (torch.compile(f, fullgraph=True, dynamic=True) for f in (model.prefill, model.step))
    others: list[Row | Built] = [_run("torch.compile", model, prompt, count, prefill, step, eager.tokens.to(device))]
    engines = ("tensorrt",) if importlib.util.find_spec("tensorrt_rtx") else ()
    manifest = save_artifact(model, folder, (*DEFAULT_BACKENDS, *engines), progress=say)
    with tempfile.TemporaryDirectory() as temporary:
        given = Path(temporary) / "given.npz"
        np.savez(given, prompt=prompt.cpu().numpy(), continuation=eager.tokens.numpy())
        for backend, entry in manifest["backends"].items():
            size = sum(manifest["files"][file]["bytes"] for file in entry["programs"].values())
            if backend == "tensorrt" and (gpus := entry["compute_capabilities"]) and not _gpu_among(gpus):
                others.append(Built(f"tensorrt-rtx, for GPUs {', '.join(gpus)}", size, entry["seconds"]))
                continue
            say(f"{backend} run, in a process without the model's code")
            told = Path(temporary) / f"{backend}.npz"
            subprocess.run([sys.executable, "-m", "gka_compile._replay", folder, backend, given, told], check=True)
            found = np.load(told)
            tokens, logits = (torch.from_numpy(found[name]) for name in ("tokens", "logits"))
            others.append(Row(backend, tokens, logits, count / float(found["seconds"]), size, entry["seconds"]))
    return eager, others


def _gpu_among(compute_capabilities: Sequence[str]) -> bool:
    try:
        return Driver().capability in compute_capabilities
    except DriverError:
        return False
