"""Independent loops of variants with passes and states of their own: plain numpy.

They share no code with samx or optax. `draws[name][t, i]` are the numbers of step t and draw i.
"""

import functools

import jax
import numpy as np
import problem
from reference import across, global_norm, inner, moved


@functools.cache
def _functions():
    def mean(params, batch):
        return problem.losses_fn(params, batch).mean()

    return jax.jit(mean), jax.jit(jax.grad(mean)), jax.jit(jax.hessian(mean))


class Batch:
    """The loss of one batch, its gradient, and products with its Hessian."""

    def __init__(self, batch):
        self.batch = batch

    def loss(self, params):
        return float(_functions()[0](params, self.batch))

    def gradient(self, params):
        return {k: np.asarray(g) for k, g in _functions()[1](params, self.batch).items()}

    def product(self, params, v):
        h = _functions()[2](params, self.batch)
        return {k: sum(np.tensordot(h[k][j], v[j], v[j].ndim) for j in v) for k in v}


def train(rule, steps):
    """Train with `rule(t, params, batch) -> params`; return the parameters after every step."""
    data, params = problem.make()
    params, trajectory = {k: np.asarray(w) for k, w in params.items()}, []
    for t in range(steps):
        params = rule(t, params, Batch(problem.batch_at(data, t)))
        trajectory.append(params)
    return {k: np.stack([p[k] for p in trajectory]) for k in params}


def unit(g):
    length = global_norm(g)
    return {k: x / length if length else x for k, x in g.items()}


def plus(a, scale, b):
    return {k: a[k] + scale * b[k] for k in a}


def on(base, combine):
    """Make the rule of a variant that stands before a base: `combine(t, w, batch) -> gradient`."""
    return lambda t, w, batch: base.step(w, combine(t, w, batch))


def cr_sam(perturb, gamma, beta):
    def combine(t, w, batch):
        g = batch.gradient(w)
        eps = perturb(w, g)
        p, q = batch.gradient(moved(w, eps)), batch.gradient(plus(w, -1, eps))
        return {k: p[k] + gamma * (p[k] + q[k] - 2 * g[k]) + beta * (p[k] - q[k]) for k in g}

    return combine


def slerp(v_0, v_1, alpha):
    theta = np.arccos(np.clip(inner(v_0, v_1), -1, 1))
    a, b = (np.sin(x * theta) / np.sin(theta) for x in (1 - alpha, alpha))
    return {k: a * v_0[k] + b * v_1[k] for k in v_0}


def xsam(perturb, climbs, every, tried, rho_max, alpha=None):
    """`tried` are the α of the search, or `alpha` takes its place."""
    held = [1.0 if alpha is None else alpha]

    def combine(t, w, batch):
        point = w
        for _ in range(climbs):
            point = moved(point, perturb(point, batch.gradient(point)))
        g_s = batch.gradient(point)
        v_0, v_1 = unit(plus(point, -1, w)), unit(g_s)
        if alpha is None and t % every == 0:
            losses = [batch.loss(plus(w, rho_max, slerp(v_0, v_1, a))) for a in tried]
            held[0] = tried[int(np.argmax(losses))]
        return {k: global_norm(g_s) * x for k, x in slerp(v_0, v_1, held[0]).items()}

    return combine


def x_sam(perturb, alpha, every, iterations, start, steps_per_epoch=None):
    held = []

    def combine(t, w, batch):
        count = t % steps_per_epoch if steps_per_epoch else t
        if count > 0 and count % every == 0:
            v = held[0] if held else start
            for _ in range(iterations):
                v = unit(batch.product(w, v))
            held[:] = [v]
        g_s = batch.gradient(moved(w, perturb(w, batch.gradient(w))))
        if not held:
            return g_s
        (v,), u = held, unit(g_s)
        return plus(u, -alpha * abs(inner(u, v)), v)

    return combine


def lookbehind(base, perturb, k, alpha):
    """`alpha` is a number, or "adaptive"."""

    def rule(t, w, batch):
        p, f, first = w, w, None
        for _ in range(k):
            p = moved(p, perturb(p, batch.gradient(p)))
            f = base.step(f, batch.gradient(p))
            first = first or f
        new = {}
        for name in w:
            a = alpha
            if alpha == "adaptive":
                d, e = first[name] - w[name], f[name] - w[name]
                a = (np.sum(d * e) / (np.linalg.norm(d) * np.linalg.norm(e)) + 1) / 2
            new[name] = a * f[name] + (1 - a) * w[name]
        return new

    return rule


def tsam(perturb, draws, samples, tilt, radius, sigma):
    def combine(t, w, batch):
        losses, gradients = [], []
        for i in range(samples):
            z = {k: sigma * draws[k][t, i] for k in w}
            short = min(global_norm(z), radius) / global_norm(z)
            x = {k: w[k] + short * z[k] for k in w}
            y = moved(x, perturb(x, batch.gradient(x)))
            losses.append(batch.loss(y))
            gradients.append(batch.gradient(y))
        tilted = np.exp(tilt * (np.array(losses) - max(losses)))
        weights = tilted / tilted.sum()
        return {k: sum(p * g[k] for p, g in zip(weights, gradients, strict=True)) for k in w}

    return combine


def sam_polyak(perturb, bound, lowest, decay):
    def rule(t, w, batch):
        eps = perturb(w, batch.gradient(w))
        point = moved(w, eps)
        g_s = batch.gradient(point)
        rate = (batch.loss(point) - lowest - inner(g_s, eps)) / inner(g_s, g_s)
        rate = min(max(rate, 0.0), bound)
        return {k: w[k] - rate * (g_s[k] + decay * w[k]) for k in w}

    return rule


class Sassha:
    """SASSHA, or M-SASSHA; `signs[name][t, i]`, a list of rates, and an ascent."""

    def __init__(self, perturb, signs, rate, *, every, samples, power, decay=0.0, by_momentum=False,
                 b1=0.9, b2=0.999, eps=1e-4):  # fmt: skip
        self.perturb, self.signs, self.rate, self.decay = perturb, signs, rate, decay
        self.every, self.samples, self.power, self.eps = every, samples, power, eps
        self.b1, self.b2, self.by_momentum, self.m, self.d = b1, b2, by_momentum, None, None

    def power_at(self, t):
        return self.power[t] if isinstance(self.power, list) else self.power

    def __call__(self, t, w, batch):
        zeros = {k: np.zeros_like(x) for k, x in w.items()}
        self.m, self.d = self.m or zeros, self.d or zeros
        climbed = {k: -x for k, x in self.m.items()} if self.by_momentum else batch.gradient(w)
        point = moved(w, self.perturb(w, climbed))
        if t % self.every == 0:
            total = zeros
            for i in range(self.samples):
                z = {k: self.signs[k][t, i] for k in w}
                product = batch.product(point, z)
                total = {k: total[k] + z[k] * product[k] / self.samples for k in w}
            self.d = {k: self.b2 * self.d[k] + (1 - self.b2) * np.abs(total[k]) for k in w}
            self.correction = (1 - self.b2 ** (t + 1)) ** self.power_at(t)
        g_s, rate = (
            batch.gradient(point),
            self.rate[t] if isinstance(self.rate, list) else self.rate,
        )
        self.m = {k: self.b1 * self.m[k] + (1 - self.b1) * g_s[k] for k in w}
        new = {}
        for k in w:
            root = self.d[k] ** self.power_at(t) / self.correction
            step = self.m[k] / (1 - self.b1 ** (t + 1)) / (root + self.eps)
            new[k] = (1 - rate * self.decay) * w[k] - rate * step
        return new


def gam(inner_ball, outer_ball, beta0, beta1, gamma):
    def combine(t, w, batch):
        g_0 = batch.gradient(w)
        g_1 = batch.gradient(moved(w, inner_ball(w, g_0)))
        far = moved(w, outer_ball(w, plus(g_1, -1, g_0)))
        g_2 = batch.gradient(far)
        g_3 = batch.gradient(moved(far, inner_ball(far, g_2)))
        p = plus(g_0, abs(1 - beta0), g_2)
        q = {k: beta1 * g_1[k] + (1 - beta1) * g_3[k] for k in w}
        return plus(q, -gamma, across(p, q))

    return combine


def gam_exact(ball, rho, alpha):
    def combine(t, w, batch):
        g = batch.gradient(w)
        point = moved(w, ball(w, batch.product(w, unit(g))))
        curved = batch.product(point, unit(batch.gradient(point)))
        return plus(g, alpha * rho, curved)

    return combine
