"""The decisions of a policy on a sequence of gradients."""

import jax
import jax.numpy as jnp
import numpy as np


def decide(policy, gradients, sharp_gradients=None, state=None):
    """Return the decisions on a sequence of gradients, and the state after each step."""
    gradients = jnp.asarray(gradients)
    sharp_gradients = gradients if sharp_gradients is None else jnp.asarray(sharp_gradients)

    def step(state, pair):
        g, g_s = pair
        is_sharp, state = policy.decide(g, state)
        state = jax.lax.cond(is_sharp, lambda: policy.observe(g, g_s, state), lambda: state)
        return state, (is_sharp, state)

    start = policy.init(gradients[0]) if state is None else state
    scan = jax.jit(lambda state, pairs: jax.lax.scan(step, state, pairs)[1])
    decisions, states = scan(start, (gradients, sharp_gradients))
    return np.asarray(decisions), states


def state_behind(states, step):
    return jax.tree.map(lambda x: x[step], states)
