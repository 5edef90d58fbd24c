"""Error and time of the authors' GKA kernels and ours, on the same inputs in one run on one GPU.

    python benchmarks/compare_authors.py --hmf CHECKOUT [--quick]

CHECKOUT is a checkout of awslabs/hybrid-model-factory; its ops need fla-core and einops. Their autotune lists are cut to a few
configurations, for with the full ones the first call takes minutes (docs/design.md). Prints Markdown.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from gka_compile import chunk_gka
from gka_compile.custom_ops import recurrent_gka

OPS = "training/src/hmf/model/hybrid_zoo/layers/gated_kalmanet/ops"
NAMES = ("q", "k", "v", "alpha", "g")


def trim_autotuners() -> None:
    """Keep 4 and 8 warps with 2 and 3 stages of every autotuned kernel that is imported from here on."""
    autotune = triton.autotune

    def trimmed(configs: list[Any], *args: Any, **kwargs: Any) -> Any:
        kept = [c for c in configs if c.num_warps in (4, 8) and c.num_stages in (2, 3)] or configs[:1]
        return autotune(kept[:4], *args, **kwargs)

    triton.autotune = trimmed


def load_authors(checkout: Path) -> Callable[..., Any]:
    """Their ``gka_chebyshev_gla``."""
    trim_autotuners()
    sys.path.insert(0, str(checkout / OPS))
    return importlib.import_module("chebyshev.gka_chebyshev_solve").gka_chebyshev_gla


def make_inputs(B: int, T: int, H: int, D: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[Tensor]:
    """q, k, v, alpha, g as the released layer makes them: unit q and k, gates of its initialisation, beta folded into k and v."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    unit = torch.nn.functional.normalize
    beta = normal(B, T, H, 1).sigmoid()
    rate = torch.rand(H, generator=generator, device="cuda") * 16
    bias = torch.empty(H, device="cuda").uniform_(0.001, 0.1, generator=generator).expm1().log()
    g = -rate * torch.nn.functional.softplus(0.5 * normal(B, T, H) + bias)
    k, v = unit(normal(B, T, H, D), dim=-1) * beta, normal(B, T, H, D) * beta
    return [unit(normal(B, T, H, D), dim=-1).to(dtype), k.to(dtype), v.to(dtype), normal(B, T, H).sigmoid().to(dtype), g]


def errors(function: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, float]:
    """Relative error of o and of every gradient to autograd through the exact float64 solve."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    o = function(*leaves)
    do = torch.randn(o.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(o.dtype)
    found = (o, *torch.autograd.grad(o, leaves, do))
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    q, k, v, alpha, g = exact
    oracle_o, _, _ = recurrent_gka(q, k, v, g, g, alpha, num_iter=None)
    oracle = (oracle_o, *torch.autograd.grad(oracle_o, exact, do.double().cpu()))
    names = ("o", *(f"d{n}" for n in NAMES))
    return {n: ((a.double().cpu() - b).norm() / b.norm()).item() for n, a, b in zip(names, found, oracle, strict=True)}


def median(function: Callable[[], Any], repeat: int) -> float:
    return triton.testing.do_bench(function, warmup=25, rep=repeat, return_mode="median")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hmf", type=Path, help="checkout of awslabs/hybrid-model-factory")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    options = parser.parse_args()
    repeat = 60 if options.quick else 300

    def ours(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, g: Tensor) -> Tensor:
        return chunk_gka(q, k, v, g, g, alpha)[0]

    sides: dict[str, Callable[..., Tensor]] = {"ours": ours}
    if options.hmf is not None:
        gka = load_authors(options.hmf)
        sides["authors"] = lambda q, k, v, alpha, g: gka(q, k, v, alpha, g, g, q.shape[-1] ** -0.5)[0]

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}")
    print("\nRelative error to autograd through the exact float64 solve, B1 T384 H4 K=V=128, bf16, 30 iterations\n")
    names = ("o", *(f"d{n}" for n in NAMES))
    print("| side | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for side, function in sides.items():
        found = errors(function, make_inputs(1, 384, 4, 128))
        print(f"| {side} | " + " | ".join(f"{found[n]:.2e}" for n in names) + " |", flush=True)

    print("\nMedian ms, bf16, 30 iterations\n\n| work | " + " | ".join(sides) + " |\n|---|" + "---|" * len(sides))
    for B, T, H, D in ((8, 4096, 16, 128), (1, 32768, 16, 128), (8, 4096, 32, 64)):
        inputs = [x.requires_grad_() for x in make_inputs(B, T, H, D)]
        rows: dict[str, list[float]] = {"forward": [], "forward+backward": []}
        for function in sides.values():
            do = torch.randn_like(function(*inputs))

            def both(function: Any = function, inputs: Any = inputs, do: Any = do) -> Any:
                return torch.autograd.grad(function(*inputs), inputs, do)

            def forward(function: Any = function, inputs: Any = inputs) -> Any:
                with torch.no_grad():
                    return function(*inputs)

            rows["forward"].append(median(forward, repeat))
            rows["forward+backward"].append(median(both, repeat))
        for work, times in rows.items():
            print(f"| {work} B{B} T{T} H{H} K=V={D} | " + " | ".join(f"{t:.2f}" for t in times) + " |", flush=True)


if __name__ == "__main__":
    main()
