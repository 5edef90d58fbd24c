"""chunk_gka over a whole sequence, step_gka over the same tokens one by one, and a gradient.  A second on a CPU.

python examples/quickstart.py             # with --compile: torch.compile as well, which takes a while
"""

import sys

import torch
import torch.nn.functional as F

from gka_compile import GKAState, chunk_gka, step_gka

torch.manual_seed(0)
B, T, H, Hk, K, V = 2, 100, 4, 2, 32, 32  # Hk key/value heads serve H query heads
q = F.normalize(torch.randn(B, T, H, K), dim=-1).requires_grad_()
k = F.normalize(torch.randn(B, T, Hk, K), dim=-1).requires_grad_()
v = torch.randn(B, T, Hk, V, requires_grad=True)
g = F.logsigmoid(torch.randn(B, T, H) + 3).requires_grad_()  # log decay, at most 0; here of both states
alpha, beta = torch.rand(B, T, H), torch.rand(B, T, H)

# Training: the whole sequence at once, differentiable in every input.
o, state = chunk_gka(q, k, v, g, g, alpha, output_final_state=True, beta=beta)
o.square().mean().backward()
assert state is not None
print(f"o {tuple(o.shape)}, H {tuple(state.h_kk.shape)}, U {tuple(state.h_kv.shape)}, |dk| {k.grad.norm():.3e}")

# Serving: prefill all but ten tokens, then decode those one at a time. It is the same function.
with torch.no_grad():
    start = T - 10
    cut = [x[:, :start] for x in (q, k, v, g, g, alpha)]
    _, s = chunk_gka(*cut, output_final_state=True, beta=beta[:, :start])
    for t in range(start, T):
        o_t, s = step_gka(q[:, t], k[:, t], v[:, t], s, g[:, t], g[:, t], alpha[:, t], beta=beta[:, t])
        torch.testing.assert_close(o_t, o[:, t], rtol=1e-4, atol=1e-5)
    assert isinstance(s, GKAState)
    torch.testing.assert_close(s.h_kk, state.h_kk, rtol=1e-4, atol=1e-5)
print("prefill and ten steps agree with the whole sequence")

# Under torch.compile each op is one node: no graph break, and one compilation serves all lengths.
if "--compile" in sys.argv[1:]:
    compiled = torch.compile(chunk_gka, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (T, 37):
            inputs = [x[:, :length] for x in (q, k, v, g, g, alpha)]
            o_c, _ = compiled(*inputs, beta=beta[:, :length])
            torch.testing.assert_close(o_c, o[:, :length], rtol=1e-4, atol=1e-5)
    print("torch.compile agrees at two lengths")
