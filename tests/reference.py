"""Independent references, written as PyTorch users would write them: loops that change things.

They share no code with samx, nor with optax.
"""

import copy

import jax
import numpy as np
import problem


class SGD:
    def __init__(self, lr, momentum=0.0, nesterov=False, weight_decay=0.0):
        self.lr, self.momentum, self.nesterov = lr, momentum, nesterov
        self.weight_decay, self.buffer, self.step_count = weight_decay, None, 0

    def step(self, params, grads):
        lr = self.lr(self.step_count) if callable(self.lr) else self.lr
        self.step_count += 1
        d = {k: grads[k] + self.weight_decay * params[k] for k in params}
        if self.momentum:
            buffer = self.buffer or {k: np.zeros_like(params[k]) for k in params}
            self.buffer = {k: self.momentum * buffer[k] + d[k] for k in params}
            look_ahead = {k: d[k] + self.momentum * self.buffer[k] for k in params}
            d = look_ahead if self.nesterov else self.buffer
        return {k: params[k] - lr * d[k] for k in params}


class Adam:
    def __init__(self, lr, weight_decay=0.0):
        self.lr, self.weight_decay, self.t, self.m, self.v = lr, weight_decay, 0, 0.0, 0.0

    def step(self, params, grads):
        self.t += 1
        new = {}
        self.m = self.m or dict.fromkeys(params, 0.0)
        self.v = self.v or dict.fromkeys(params, 0.0)
        self.m = {k: 0.9 * self.m[k] + 0.1 * grads[k] for k in params}
        self.v = {k: 0.999 * self.v[k] + 0.001 * grads[k] ** 2 for k in params}
        for k, w in params.items():
            m_hat = self.m[k] / (1 - 0.9**self.t)
            v_hat = self.v[k] / (1 - 0.999**self.t)
            new[k] = w - self.lr * (m_hat / (np.sqrt(v_hat) + 1e-8) + self.weight_decay * w)
        return new


def global_norm(tree):
    return np.sqrt(sum(np.sum(leaf**2) for leaf in tree.values()))


def ball(rho):
    def perturb(params, g):
        length = global_norm(g) + 1e-12
        return {k: rho * g[k] / length for k in g}

    return perturb


def adaptive_ball(rho, eta, scaled):
    def perturb(params, g):
        t = {k: np.abs(params[k]) + eta if k in scaled else np.ones_like(params[k]) for k in g}
        length = global_norm({k: t[k] * g[k] for k in g}) + 1e-12
        return {k: rho * t[k] * t[k] * g[k] / length for k in g}

    return perturb


def sign_ball(rho):
    return lambda params, g: {k: rho * np.sign(g[k]) for k in g}


def _gradient(losses_fn):
    gradient = jax.jit(jax.grad(lambda p, b: losses_fn(p, b).mean()))
    return lambda params, batch: {k: np.asarray(v) for k, v in gradient(params, batch).items()}


def _start():
    data, params = problem.make()
    return data, {k: np.asarray(v) for k, v in params.items()}


def _stack(trajectory):
    return {k: np.stack([params[k] for params in trajectory]) for k in trajectory[0]}


def train_sam(base, perturb, steps, ascent_steps=1, losses_fn=problem.losses_fn):
    """SAM; `perturb` may be a list, one function for every step (a schedule of the radius)."""
    data, params = _start()
    gradient, trajectory = _gradient(losses_fn), []
    for t in range(steps):
        batch = problem.batch_at(data, t)
        climb = perturb[t] if isinstance(perturb, list) else perturb
        point, g = params, gradient(params, batch)
        for _ in range(ascent_steps):
            eps = climb(point, g)
            point = {k: point[k] + eps[k] for k in point}
            g = gradient(point, batch)
        params = base.step(params, g)
        trajectory.append(params)
    return _stack(trajectory)


def train_sampa(base, rho, lam, steps, losses_fn=problem.losses_fn):
    """SAMPa; `rho` and `lam` may be lists, one number for every step."""
    data, x = _start()
    gradient, trajectory = _gradient(losses_fn), []
    g_y = {k: np.zeros_like(v) for k, v in x.items()}
    previous = problem.batch_at(data, 0)
    for t in range(steps):
        batch = problem.batch_at(data, t)
        eps = ball(rho[t] if isinstance(rho, list) else rho)(x, g_y)
        y = x if t == 0 else copy.deepcopy(base).step(x, g_y)
        g_tilde = gradient({k: x[k] + eps[k] for k in x}, previous)
        g_y = gradient(y, batch)
        share = lam[t] if isinstance(lam, list) else lam
        x = base.step(x, {k: (1 - share) * g_tilde[k] + share * g_y[k] for k in x})
        previous = batch
        trajectory.append(x)
    return _stack(trajectory)
