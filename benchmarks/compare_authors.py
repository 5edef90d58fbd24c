"""Error and time of the authors' GKA kernels and ours, on the same inputs in one run on one GPU.

    python benchmarks/compare_authors.py --hmf CHECKOUT [--quick]

CHECKOUT is a checkout of awslabs/hybrid-model-factory; its ops need einops and fla-core 0.4 (0.5 takes decays in base 2, they pass
natural logs). Their autotune lists are cut to a few configurations, for with the full ones the first call takes minutes
(docs/design.md). Prints Markdown.
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


def oracle(inputs: list[Tensor], do: Tensor) -> list[Tensor]:
    """o and the gradients of q, k, v, alpha and g by autograd through the exact float64 solve."""
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    q, k, v, alpha, g = exact
    o, _, _ = recurrent_gka(q, k, v, g, g, alpha, num_iter=None)
    return [o.detach(), *torch.autograd.grad(o, exact, do.double().cpu())]


def errors(function: Callable[..., Tensor], inputs: list[Tensor], do: Tensor, exact: list[Tensor]) -> list[str]:
    """Relative errors as text; "refused" where a side's backward does not run here."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    o = function(*leaves)
    found: list[Tensor | None] = [o]
    try:
        found += torch.autograd.grad(o, leaves, do)
    except RuntimeError as error:
        print(f"\nbackward: {str(error).splitlines()[0]}\n")
        found += [None] * len(leaves)
    pairs = zip(found, exact, strict=True)
    return ["refused" if a is None else f"{((a.double().cpu() - b).norm() / b.norm()).item():.2e}" for a, b in pairs]


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

    versions = f"torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}"
    print(f"{torch.cuda.get_device_name()}, {versions}")
    B, T, H, D = 1, 384, 4, 128
    print(f"\nRelative error to the exact float64 solve and autograd through it, B{B} T{T} H{H} K=V={D}, bf16, 30 iterations\n")
    inputs = make_inputs(B, T, H, D)
    do = torch.randn(B, T, H, D, generator=torch.Generator("cuda").manual_seed(1), device="cuda").bfloat16()
    exact = oracle(inputs, do)
    rows = {side: errors(function, inputs, do, exact) for side, function in sides.items()}
    print("| side | o | " + " | ".join(f"d{n}" for n in NAMES) + " |\n|---|" + "---|" * (1 + len(NAMES)))
    for side, row in rows.items():
        print(f"| {side} | " + " | ".join(row) + " |", flush=True)

    print("\nMedian ms, bf16, 30 iterations\n\n| work | " + " | ".join(sides) + " |\n|---|" + "---|" * len(sides))
    for B, T, H, D in ((8, 4096, 16, 128), (1, 32768, 16, 128), (8, 4096, 32, 64)):
        inputs = [x.requires_grad_() for x in make_inputs(B, T, H, D)]
        times: dict[str, list[str]] = {"forward": [], "forward+backward": []}
        for function in sides.values():
            do = torch.randn_like(function(*inputs))

            def both(function: Any = function, inputs: Any = inputs, do: Any = do) -> Any:
                return torch.autograd.grad(function(*inputs), inputs, do)

            def forward(function: Any = function, inputs: Any = inputs) -> Any:
                with torch.no_grad():
                    return function(*inputs)

            times["forward"].append(f"{median(forward, repeat):.2f}")
            try:
                times["forward+backward"].append(f"{median(both, repeat):.2f}")
            except RuntimeError:
                times["forward+backward"].append("refused")
        for work, row in times.items():
            print(f"| {work} B{B} T{T} H{H} K=V={D} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
