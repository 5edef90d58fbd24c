"""The Chebyshev iteration of Gated KalmaNet as a polynomial with constant coefficients.

The paper solves (H + λI) x = q, λ = a‖H‖_F, by ``num_iter`` Chebyshev iterations on the spectrum bound [λ, λ + φ], φ = ‖H‖_F
(arXiv 2511.21016, Algorithm 1).  Because λ is proportional to φ, the ridge cancels out of Z = 2H/φ − I, and the iterate is

    x = (1/φ) Σ_{n=0..N} c_n T_n(Z) q

with coefficients that depend on a and N alone.  After N iterations the residual is r = T_{N+1}(−Z)/T_{N+1}(w) q, w = 1 + 2a, so

    (φ/2) x = [T_{N+1}(w) − T_{N+1}(−Z)] / [T_{N+1}(w) (w + Z)] q

and the identity (T_M(w) − T_M(u))/(w − u) = 2 Σ'_{n<M} U_{M−1−n}(w) T_n(u) gives every c_n in closed form:

    c_n = (−1)^n (2 − δ_{n0}) · 2 U_{N−n}(w)/T_{N+1}(w)
        = (−1)^n (2 − δ_{n0}) · (2/sinh θ) τ^n (1 − τ^{2(N+1−n)})/(1 + τ^{2(N+1)}),   cosh θ = w,  τ = e^{−θ}.

The last form is what kernels evaluate: two numbers describe the whole polynomial.
"""

from __future__ import annotations

import math

__all__ = ["chebyshev_coefficients", "chebyshev_rate", "chebyshev_tau"]


def chebyshev_rate(ridge_ratio: float) -> float:
    """θ = arccosh(1 + 2a), the logarithm of what one iteration divides the error by."""
    return 2.0 * math.asinh(math.sqrt(ridge_ratio))  # the same, and keeps its digits for tiny a


def chebyshev_tau(ridge_ratio: float) -> float:
    """τ = e^{−θ}: the factor by which one iteration reduces the error (0.754 at a = 0.02)."""
    return math.exp(-chebyshev_rate(ridge_ratio))


def chebyshev_coefficients(ridge_ratio: float, num_iter: int) -> list[float]:
    """Coefficients c_0 .. c_N, N = ``num_iter``, of φx = Σ c_n T_n(Z) q (see the module docstring)."""
    tau = chebyshev_tau(ridge_ratio)
    degree = num_iter + 1
    front = 2.0 / (math.sinh(chebyshev_rate(ridge_ratio)) * (1.0 + tau ** (2 * degree)))
    return [
        (-1.0) ** n * (1.0 if n == 0 else 2.0) * front * tau**n * (1.0 - tau ** (2 * (degree - n))) for n in range(num_iter + 1)
    ]
