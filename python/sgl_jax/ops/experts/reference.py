"""Reference of routed experts, token by token in float64 numpy. For tests."""

import numpy as np


def routed_experts(x, gate_up, down, layer, expert, weights):
    """Sum weighed outputs of SiLU-gated experts. x [T, D], gate_up [L, E, 2F, D], down [L, E, D, F], expert and weights [T, X],
    where an expert E is none. Returns [T, D]."""
    x, gate_up, down = (np.asarray(array, np.float64) for array in (x, gate_up[layer], down[layer]))
    out = np.zeros_like(x)
    for token, choice in np.argwhere(np.asarray(expert) < len(down)):
        number = expert[token, choice]
        gate, up = np.split(gate_up[number] @ x[token], 2)
        out[token] += weights[token, choice] * (down[number] @ (gate / (1 + np.exp(-gate)) * up))
    return out
