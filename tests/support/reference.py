"""Independent references, written as in PyTorch: plain loops that change their state.

They share no code with samx or optax.
"""

import copy
import functools
import itertools

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
        buffer = self.buffer or {k: np.zeros_like(params[k]) for k in params}
        self.buffer = {k: self.momentum * buffer[k] + d[k] for k in params}
        ahead = {k: d[k] + self.momentum * self.buffer[k] for k in params}
        d = ahead if self.nesterov else self.buffer
        return {k: params[k] - lr * d[k] for k in params}


class Adam:
    def __init__(self, lr, weight_decay=0.0, decay_behind=False):
        self.lr, self.weight_decay, self.decay_behind = lr, weight_decay, decay_behind
        self.t, self.m, self.v = 0, 0.0, 0.0

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
            moved = w - self.lr * m_hat / (np.sqrt(v_hat) + 1e-8)
            decayed = moved if self.decay_behind else w
            new[k] = moved - self.lr * self.weight_decay * decayed
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
        t = scales_of(params, eta, scaled)
        length = global_norm({k: t[k] * g[k] for k in g}) + 1e-12
        return {k: rho * t[k] * t[k] * g[k] / length for k in g}

    return perturb


def layer_ball(rho, eta, scaled):
    """The ball of a metric with one number for each tensor."""

    def perturb(params, g):
        t = {k: np.sqrt(np.sum(params[k] ** 2)) + eta if k in scaled else 1.0 for k in g}
        length = global_norm({k: t[k] * g[k] for k in g}) + 1e-12
        return {k: rho * t[k] * t[k] * g[k] / length for k in g}

    return perturb


def sign_ball(rho):
    return lambda params, g: {k: rho * np.sign(g[k]) for k in g}


def scales_of(params, eta, scaled):
    """The metric of ASAM."""
    return {k: np.abs(w) + eta if k in scaled else np.ones_like(w) for k, w in params.items()}


def layer_steps(rho, scaling):
    def perturb(params, g):
        total, eps = global_norm(g), {}
        for k in g:
            w_norm, g_norm = np.sqrt(np.sum(params[k] ** 2)), np.sqrt(np.sum(g[k] ** 2))
            eps[k] = rho * scaling(w_norm, g_norm, total) * g[k]
        return eps

    return perturb


def unnormalized_step(rho):
    return lambda params, g: {k: rho * g[k] for k in g}


def adaptive_step(rho, eta, scaled):
    def perturb(params, g):
        t = scales_of(params, eta, scaled)
        return {k: rho * t[k] ** 2 * g[k] for k in g}

    return perturb


def fisher_ball(rho, eta):
    def perturb(params, g):
        inverse = {k: 1 / (1 + eta * g[k] ** 2) for k in g}
        length = np.sqrt(sum(np.sum(g[k] * inverse[k] * g[k]) for k in g))
        return {k: rho * inverse[k] * g[k] / length for k in g}

    return perturb


def monge_ball(rho):
    def perturb(params, g):
        n = global_norm(g)
        return {k: rho * g[k] / n / np.sqrt(1 + n * n) for k in g}

    return perturb


def mup_ball(rho, scales, weights):
    """µP²'s ball: each tensor has one factor in the numerator and another one in the norm."""

    def perturb(params, g):
        length = global_norm({k: weights[k] * g[k] for k in g})
        return {k: rho * scales[k] * g[k] / length for k in g}

    return perturb


class Friendly:
    """Friendly SAM's perturbation, in the order of the authors' code; `balls` are used in turn.

    `calls` is the number of calls per step. Only the last call of a step updates the average.
    """

    def __init__(self, balls, sigma, decay, calls=1):
        self.balls, self.calls = itertools.cycle(balls), calls
        self.sigma, self.decay = sigma, decay
        self.average, self.seen = None, []

    def __call__(self, params, g):
        d = g
        if self.average is not None:
            d = {k: g[k] - self.sigma * self.average[k] for k in g}
        eps = next(self.balls)(params, d)
        self.seen.append(g)
        if len(self.seen) == self.calls:
            g = {k: sum(x[k] for x in self.seen) / self.calls for k in g}
            old = self.average or g
            self.average = {k: self.decay * old[k] + (1 - self.decay) * g[k] for k in g}
            self.seen = []
        return eps


@functools.cache
def _gradient(losses_fn):
    gradient = jax.jit(jax.grad(lambda p, b: losses_fn(p, b).mean()))
    return lambda params, batch: {k: np.asarray(v) for k, v in gradient(params, batch).items()}


def _start():
    data, params = problem.make()
    return data, {k: np.asarray(v) for k, v in params.items()}


def _stack(trajectory):
    return {k: np.stack([params[k] for params in trajectory]) for k in trajectory[0]}


def train_sam(base, perturb, steps, ascent_steps=1, losses_fn=problem.losses_fn):
    """Train with SAM; `perturb` may be a list with one function per step (a radius schedule)."""
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
    """Train with SAMPa; `rho` and `lam` may be lists with one number per step."""
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


def train_gated(base, perturb, combine, steps, num_shards=1, losses_fn=problem.losses_fn):
    """Return the trajectory, and whether each step was sharp.

    `combine(t, g, look)` returns what the base gets; `look()` computes the sharp gradient. With
    several shards, the sharp gradient is the mean over equal parts of the batch, each at its own
    perturbed point. `perturb` sees every gradient, so a moving average in it includes all of them.
    """
    data, params = _start()
    gradient, trajectory, is_sharp = _gradient(losses_fn), [], []
    for t in range(steps):
        batch = problem.batch_at(data, t)
        g = gradient(params, batch)
        size = problem.BATCH_SIZE // num_shards
        shards = [
            {k: x[i * size : (i + 1) * size] for k, x in batch.items()} for i in range(num_shards)
        ]
        climbs = [perturb(params, gradient(params, shard)) for shard in shards]

        def look(params=params, shards=shards, climbs=climbs):
            is_sharp[-1] = True
            sharp = [
                gradient({k: params[k] + eps[k] for k in params}, shard)
                for shard, eps in zip(shards, climbs, strict=True)
            ]
            return {k: sum(g_s[k] for g_s in sharp) / num_shards for k in params}

        is_sharp.append(False)
        params = base.step(params, combine(t, g, look))
        trajectory.append(params)
    return _stack(trajectory), is_sharp


def inner(a, b):
    return sum(np.sum(a[k] * b[k]) for k in a)


def sometimes(decide, gamma=1.0):
    """Periodic SAM, randomized SAM and AE-SAM; with another `gamma`, G-RST."""

    def combine(t, g, look):
        if not decide(t, g):
            return g
        g_s = look()
        return {k: (1 - gamma) * g[k] + gamma * g_s[k] for k in g}

    return combine


def across(a, b):
    """The component of `a` orthogonal to `b`."""
    projection = inner(a, b) / inner(b, b)
    return {k: a[k] - projection * b[k] for k in a}


def gsam(alpha, clean=False):
    """GSAM; `alpha` may be a list with one number per step."""

    def combine(t, g, look):
        g_s, share = look(), alpha[t] if isinstance(alpha, list) else alpha
        if clean:
            return {k: g[k] + share * across(g_s, g)[k] for k in g}
        return {k: g_s[k] - share * across(g, g_s)[k] for k in g}

    return combine


def weighted(gamma):
    """Coupled WSAM: the base gets the weighted gradient."""

    def combine(t, g, look):
        g_s, alpha = look(), gamma / (1 - gamma)
        return {k: g[k] + alpha * (g_s[k] - g[k]) for k in g}

    return combine


def renormalized(t, g, look):
    g_s = look()
    return {k: g_s[k] * global_norm(g) / global_norm(g_s) for k in g}


class LookSAM:
    """LookSAM and AE-LookSAM; `alpha` may be a list with one number per step."""

    def __init__(self, decide, alpha):
        self.decide, self.alpha, self.g_v = decide, alpha, None

    def __call__(self, t, g, look):
        if self.decide(t, g):
            g_s = look()
            projection = inner(g, g_s) / inner(g, g)
            self.g_v = {k: g_s[k] - projection * g[k] for k in g}
            return g_s
        if self.g_v is None:
            return g
        alpha = self.alpha[t] if isinstance(self.alpha, list) else self.alpha
        ratio = global_norm(g) / global_norm(self.g_v)
        return {k: g[k] + alpha * ratio * self.g_v[k] for k in g}


class Reuse:
    """ARSAM: the second-order part of the last sharp step, at a weight that decays with its age."""

    def __init__(self, decide, decay):
        self.decide, self.decay, self.h, self.age = decide, decay, None, 0

    def __call__(self, t, g, look):
        if self.decide(t, g):
            g_s, self.age = look(), 0
            self.h = {k: g_s[k] - g[k] for k in g}
            return g_s
        self.age += 1
        return {k: g[k] + self.decay**self.age * self.h[k] for k in g}


def listed(decisions):
    return lambda t, g: bool(decisions[t])


class SquaredNorm:
    """AE-SAM's test of the squared gradient norm, with one threshold per step."""

    def __init__(self, thresholds, delta):
        self.thresholds, self.delta, self.mu, self.sigma2 = thresholds, delta, 0.0, np.exp(-10.0)

    def __call__(self, t, g):
        s = inner(g, g)
        self.mu = self.delta * self.mu + (1 - self.delta) * s
        self.sigma2 = self.delta * self.sigma2 + (1 - self.delta) * (s - self.mu) ** 2
        return s >= self.mu + self.thresholds[t] * np.sqrt(self.sigma2)


class VSAM:
    """vSAM and its controller, with the names of the authors' code."""

    def __init__(self, draws, window, max_p, hp1, hp2, warmup, last_layer):
        (self.K, self.b), (self.a1, self.a2), self.beta = window, hp1, hp2
        self.draws, self.warmup, self.last_layer = draws, warmup, last_layer
        self.largest = int(self.K * max_p)
        self.psf, self.ratio, self.variances = [0.0] * self.K, [0.0] * self.K, []
        self.base_sr, self.p, self.cnt, self.flag, self.coef = 1.0, 0.5, 0, 1, 1.0
        self.base_srs = []

    def __call__(self, t, g, look):
        is_sam = self.sampling(t)
        self.base_srs.append(self.base_sr)
        if is_sam:
            g_s = look()
            self.h = {k: g_s[k] - g[k] for k in g}
            self.coef = 1.0
            self.measure(g)
            return {k: g[k] + self.h[k] for k in g}
        if self.coef > self.beta**6:
            self.coef *= self.beta
            return {k: g[k] + self.coef * self.h[k] for k in g}
        return g

    def sampling(self, t):
        if t < self.warmup:
            self.cnt = 1
            return True
        if self.flag % self.K == 0:
            a, b = self.trend(self.ratio), self.trend(self.variances[-self.K :])
            base_sr = self.base_sr * (1 + self.a1 * a + self.a2 * b)
            self.base_sr = min(max(base_sr, 1.0), self.largest)
            self.p, self.cnt = self.base_sr / self.K, 0
        quota = int(self.base_sr)
        is_sam = self.cnt < quota and self.draws[t] >= 1 - self.p
        is_sam = is_sam or self.K - self.flag % self.K <= quota - self.cnt
        self.flag += 1
        self.cnt += is_sam
        return is_sam

    def measure(self, g):
        psf = global_norm({k: self.h[k] for k in self.last_layer})
        self.psf = [*self.psf[1:], psf]
        self.ratio = [*self.ratio[1:], psf / global_norm({k: g[k] for k in self.last_layer})]
        blocks = np.array_split(sorted(self.psf), self.b)
        self.variances.append(np.mean([np.var(block, ddof=1) for block in blocks]))

    @staticmethod
    def trend(x):
        changes = [(after - before) / before for before, after in itertools.pairwise(x)]
        return min(max(np.mean(changes), -1.0), 1.0)


def train_momentum_sam(base, perturb, steps, decay=0.0, losses_fn=problem.losses_fn):
    """Train with Momentum-SAM on the buffer of SGD or Adam; `decay` acts on the perturbed weights.

    `perturb` may be a list with one function per step.
    """
    data, params = _start()
    gradient, trajectory = _gradient(losses_fn), []
    for t in range(steps):
        batch = problem.batch_at(data, t)
        v = base.m if isinstance(base, Adam) else base.buffer
        climb = perturb[t] if isinstance(perturb, list) else perturb
        eps = climb(params, v or {k: np.zeros_like(params[k]) for k in params})
        q = {k: params[k] - eps[k] for k in params}
        g = gradient(q, batch)
        params = base.step(params, {k: g[k] + decay * q[k] for k in params})
        trajectory.append(params)
    return _stack(trajectory)


def train_async_sam(base, perturb, ascent_size, steps, first="plain"):
    """Train with AsyncSAM; the ascent batch is the first examples of the batch.

    `perturb` may be a list with one function per step.
    """
    data, params = _start()
    gradient, trajectory, stale = _gradient(problem.losses_fn), [], None
    for t in range(steps):
        batch = problem.batch_at(data, t)
        a = gradient(params, rows_of(batch, range(ascent_size)))
        if t == 0 and first == "sam":
            stale = a
        climb = perturb[t] if isinstance(perturb, list) else perturb
        point = params if stale is None else moved(params, climb(params, stale))
        params = base.step(params, gradient(point, batch))
        stale = a
        trajectory.append(params)
    return _stack(trajectory)


def train_lsam(base, perturb, beta, period, steps):
    """Train with LSAM, one worker and its center; an exchange comes before every period."""
    data, w = _start()
    gradient, trajectory, center = _gradient(problem.losses_fn), [], copy.deepcopy(w)
    for t in range(steps):
        batch, move = problem.batch_at(data, t), {k: np.zeros_like(w[k]) for k in w}
        if t % period == 0:
            move = {k: beta * (w[k] - center[k]) for k in w}
        g_s = gradient(moved(w, perturb(w, gradient(w, batch))), batch)
        center = moved(center, move)
        after = base.step(w, g_s)
        w = {k: after[k] - move[k] for k in w}
        trajectory.append(w)
    return _stack(trajectory)


def train_wsam(base, lr, perturb, gamma, steps, losses_fn=problem.losses_fn):
    """Train with WSAM: the sharpness term is added after the base; `lr` may depend on the step."""
    data, params = _start()
    gradient, trajectory = _gradient(losses_fn), []
    for t in range(steps):
        batch = problem.batch_at(data, t)
        g = gradient(params, batch)
        g_s = gradient(moved(params, perturb(params, g)), batch)
        rate = (lr(t) if callable(lr) else lr) * gamma / (1 - gamma)
        params = base.step(params, g)
        params = {k: params[k] - rate * (g_s[k] - g[k]) for k in params}
        trajectory.append(params)
    return _stack(trajectory)


class AdaGradNorm:
    """AdaGrad-Norm: one accumulator for all entries. It can be a base or a `perturb`."""

    def __init__(self, lr, eps):
        self.lr, self.total = lr, eps**2

    def __call__(self, params, g):
        self.total += inner(g, g)
        return {k: self.lr * g[k] / np.sqrt(self.total) for k in g}

    def step(self, params, g):
        climbed = self(params, g)
        return {k: params[k] - climbed[k] for k in params}


class AdaGrad(AdaGradNorm):
    def __call__(self, params, g):
        self.total = self.total + flat(g) ** 2
        return unflat(self.lr * flat(g) / np.sqrt(self.total), g)


class RawAdam(AdaGradNorm):
    """Adam without bias correction; with `largest`, AMSGrad. `lr` may be a list, one per step."""

    def __init__(self, lr, b1, b2, eps, largest=False):
        super().__init__(lr, eps)
        self.b1, self.b2, self.largest, self.mean, self.t = b1, b2, largest, 0.0, 0
        self.top = self.total

    def __call__(self, params, g):
        lr = self.lr[self.t] if isinstance(self.lr, list) else self.lr
        self.t += 1
        self.mean = self.b1 * self.mean + (1 - self.b1) * flat(g)
        self.total = self.b2 * self.total + (1 - self.b2) * flat(g) ** 2
        self.top = np.maximum(self.top, self.total) if self.largest else self.total
        return unflat(lr * self.mean / np.sqrt(self.top), g)


def flat(tree):
    return np.concatenate([tree[k].ravel() for k in sorted(tree)])


def unflat(vector, like):
    new, start = {}, 0
    for k in sorted(like):
        new[k] = vector[start : start + like[k].size].reshape(like[k].shape)
        start += like[k].size
    return new


@functools.cache
def _losses(losses_fn):
    losses = jax.jit(losses_fn)
    return lambda params, batch: np.asarray(losses(params, batch))


def train_on_examples(base, sharp_gradient, steps, losses_fn=problem.losses_fn):
    """Train on examples chosen by `sharp_gradient(t, params, batch, index, losses, gradient)`."""
    data, params = _start()
    trajectory, passes = [], (_losses(losses_fn), _gradient(losses_fn))
    for t in range(steps):
        index = (t % 4) * problem.BATCH_SIZE + np.arange(problem.BATCH_SIZE)
        g = sharp_gradient(t, params, problem.batch_at(data, t), index, *passes)
        params = base.step(params, g)
        trajectory.append(params)
    return _stack(trajectory)


def rows_of(batch, rows):
    return {k: x[np.asarray(rows)] for k, x in batch.items()}


def moved(params, eps):
    return {k: params[k] + eps[k] for k in params}


def ksam(perturb, k, num_groups=1):
    """K-SAM; the k worst examples of each group of neighbours."""

    def sharp_gradient(t, params, batch, index, losses, gradient):
        values = losses(params, batch)
        groups = np.split(np.arange(len(index)), num_groups)
        worst = [i for group in groups for i in sorted(group, key=lambda i: -values[i])[:k]]
        chosen = rows_of(batch, worst)
        return gradient(moved(params, perturb(params, gradient(params, chosen))), chosen)

    return sharp_gradient


def msam(perturb, num_microbatches):
    def sharp_gradient(t, params, batch, index, losses, gradient):
        sharp = []
        for j in range(num_microbatches):
            part = rows_of(batch, range(j, len(index), num_microbatches))
            point = moved(params, perturb(params, gradient(params, part)))
            sharp.append(gradient(point, part))
        return {k: sum(h[k] for h in sharp) / num_microbatches for k in params}

    return sharp_gradient


def esam(perturb, beta, gamma, draws, strict):
    """ESAM; `draws[t]` has one number per tensor, drawn at the end of step t."""

    def sharp_gradient(t, params, batch, index, losses, gradient):
        g = gradient(params, batch)
        for k in g:
            if t > 0 and draws[t - 1][k] > beta:
                g[k] = np.zeros_like(g[k])
        eps = {k: e / beta for k, e in perturb(params, g).items()}
        point = moved(params, eps)
        rise = losses(point, batch) - losses(params, batch)
        kept = int(gamma * len(index))
        if strict:
            chosen = [i for i in range(len(index)) if rise[i] > sorted(rise)[-kept]]
        else:
            chosen = sorted(range(len(index)), key=lambda i: -rise[i])[:kept]
        return gradient(point, rows_of(batch, chosen))

    return sharp_gradient


class AUSAM:
    """AUSAM, with the names of the authors' code; `draw(t, p, m)` gives m positions."""

    def __init__(self, perturb, alpha, draw, warmup, tops, fmin, num_examples=64):
        self.perturb, self.alpha, self.draw = perturb, alpha, draw
        self.warmup, self.tops, self.fmin = warmup, tops, fmin
        self.sums, self.counts = np.ones(num_examples), np.ones(num_examples)

    def __call__(self, t, params, batch, index, losses, gradient):
        rows = np.arange(len(index))
        if t >= self.warmup:
            a = (self.sums / self.counts)[index]
            scaled = (a - a.min()) / (a.max() - a.min()) * (self.tops[t] - self.fmin) + self.fmin
            rows = self.draw(t, scaled / scaled.sum(), int(self.alpha * len(index)))
        chosen, places = rows_of(batch, rows), index[rows]
        point = moved(params, self.perturb(params, gradient(params, chosen)))
        rise = np.abs(losses(point, chosen) - losses(params, chosen))
        if t < self.warmup:
            self.sums[places], self.counts[places] = rise, 1
        else:
            self.sums[places] += rise
            self.counts[places] += 1
        return gradient(point, chosen)


def train_sl_sam(base, perturb, groups, draw, rate, exploration, steps):
    """Train with SL-SAM; also return the group of every step.

    `groups` are lists of names. `draw(t, p)` gives the index of a group.
    """
    data, params = _start()
    gradient, trajectory, drawn = _gradient(problem.losses_fn), [], []
    s, largest = np.zeros(len(groups)), 0.0
    for t in range(steps):
        batch = problem.batch_at(data, t)
        p = (1 - exploration) * np.exp(s) / np.exp(s).sum() + exploration / len(groups)
        arm = draw(t, p)
        drawn.append(arm)

        def part(point, arm=arm, batch=batch):
            g = gradient(point, batch)
            return {k: g[k] if k in groups[arm] else np.zeros_like(g[k]) for k in g}

        g = part(params)
        g_s = part(moved(params, perturb(params, g)))
        before = {name: copy.deepcopy(vars(base).get(name)) for name in ("buffer", "m", "v")}
        new = base.step(params, g_s)
        for name, old in before.items():  # restore the state of the layers outside the group
            for k in params:
                if name in vars(base) and k not in groups[arm]:
                    vars(base)[name][k] = old[k] if old else np.zeros_like(params[k])
        params = {k: new[k] if k in groups[arm] else params[k] for k in params}
        largest = max(largest, global_norm(g))
        s[arm] += rate * global_norm(g) / largest / p[arm]
        trajectory.append(params)
    return _stack(trajectory), drawn


def train_bisam(base, perturb, climbed, steps, losses_fn=problem.losses_fn):
    """Train with BiSAM; `climbed(params, batch)` gives the ascent losses, one per example."""
    data, params = _start()
    up, down, trajectory = _gradient(climbed), _gradient(losses_fn), []
    for t in range(steps):
        batch = problem.batch_at(data, t)
        params = base.step(params, down(moved(params, perturb(params, up(params, batch))), batch))
        trajectory.append(params)
    return _stack(trajectory)


def train_split(base, perturb, factors, steps, losses_fn=problem.losses_fn):
    """Train with Focal-SAM or ImbSAM; `factors`: class weights of the plain and the sharp part."""
    data, params = _start()
    plain, sharp = map(np.asarray, factors)
    gradient, trajectory = _gradient(lambda p, b: b["factor"] * losses_fn(p, b)), []
    for t in range(steps):
        batch = problem.batch_at(data, t)
        head = batch | {"factor": plain[np.asarray(batch["y"])]}
        tail = batch | {"factor": sharp[np.asarray(batch["y"])]}
        g = gradient(params, head)
        h = gradient(moved(params, perturb(params, gradient(params, tail))), tail)
        params = base.step(params, {k: g[k] + h[k] for k in g})
        trajectory.append(params)
    return _stack(trajectory)


def ranked(scores, k):
    """A mask of ones at the k largest entries of all tensors."""
    order = np.argsort(-flat(scores))
    mask = np.zeros(order.size)
    mask[order[:k]] = 1
    return unflat(mask, scores)


def unstructured(sparsity):
    return lambda fisher: ranked(fisher, int(flat(fisher).size * (1 - sparsity)))


def structured(sparsity):
    def choose(fisher):
        kept, wanted = 0, int(flat(fisher).size * (1 - sparsity))
        mask = {k: np.zeros_like(f) for k, f in fisher.items()}
        for k in sorted(fisher, key=lambda k: -fisher[k].mean()):
            if kept < wanted:
                mask[k][:] = 1
                kept += mask[k].size
        return mask

    return choose


def n_of_m(n, m):
    def choose(fisher):
        mask = {k: np.ones_like(f) for k, f in fisher.items()}
        for k, f in fisher.items():
            if f.ndim > 1:
                groups = f.reshape(-1, m)
                for row, group in enumerate(groups):
                    mask[k].reshape(-1, m)[row] = np.isin(range(m), np.argsort(-group)[:n])
        return mask

    return choose


def train_fisher_sparse(base, perturb, choose, period, steps, examples=None):
    """Train with SSAM-F and the paper's Fisher information; also return the mask of every step."""
    data, params = _start()
    gradient, trajectory, masks = _gradient(problem.losses_fn), [], []
    mask = {k: np.zeros_like(w) for k, w in params.items()}
    for t in range(steps):
        batch = problem.batch_at(data, t)
        if t > 0 and (t - 1) % period == 0:
            fisher = dict.fromkeys(params, 0.0)
            seen = batch if examples is None else {k: x[examples] for k, x in data.items()}
            for j in range(len(seen["y"])):
                one = gradient(params, rows_of(seen, [j]))
                fisher = {k: fisher[k] + one[k] ** 2 for k in one}
            mask = choose(fisher)
        eps = perturb(params, gradient(params, batch))
        point = moved(params, {k: eps[k] * mask[k] for k in eps})
        params = base.step(params, gradient(point, batch))
        trajectory.append(params)
        masks.append(mask)
    return _stack(trajectory), _stack(masks)


def train_dynamic_sparse(base, perturb, mask, sparsity, rates, period, scores, steps):
    """Train with SSAM-D; `scores` are two functions of (t, g, w + eps), to drop and to grow."""
    data, params = _start()
    gradient, trajectory, masks = _gradient(problem.losses_fn), [], []
    for t in range(steps):
        batch = problem.batch_at(data, t)
        g = gradient(params, batch)
        eps = perturb(params, g)
        point = moved(params, {k: eps[k] * mask[k] for k in eps})
        masks.append(mask)
        if t % period == 0:
            size = flat(params).size
            wanted = size - size * sparsity
            kept, grown = int(wanted * (1 - rates[t])), int(min(wanted * rates[t], size * sparsity))
            drop, grow = (score(t, g, point) for score in scores)
            old = ranked({k: (np.abs(drop[k]) + 1e-7) * mask[k] for k in g}, kept)
            new = ranked({k: (np.abs(grow[k]) + 1e-7) * (1 - mask[k]) for k in g}, grown)
            mask = {k: old[k] + new[k] for k in old}
        params = base.step(params, gradient(point, batch))
        trajectory.append(params)
    return _stack(trajectory), _stack(masks)


def next_batch(data, t):
    return problem.batch_at(data, t + 1)


def shrunk(data, t):
    """The held-out examples of `problem.further`."""
    batch = problem.batch_at(data, t)
    return batch | {"x": 0.8 * batch["x"]}


def train_lets(
    base,
    perturb,
    rho,
    rate,
    steps,
    approximate=False,
    held_out=next_batch,
    training=problem.batch_at,
):
    """Train with LETS and SGD, whose step is −lr times the sharp gradient; also return the radii.

    `perturb` has radius 1. The whole Hessian is computed. `held_out(data, t)` gives the validation
    examples, `training(data, t)` those of the training loss; default: those of the step.
    """
    data, params = _start()
    losses = _losses(problem.losses_fn)
    gradient, trajectory, radii = _gradient(problem.losses_fn), [], []

    @jax.jit
    def hessian(params, batch):
        return jax.hessian(lambda p: problem.losses_fn(p, batch).mean())(params)

    for t in range(steps):
        batch, other = problem.batch_at(data, t), held_out(data, t)
        radii.append(rho)
        v = perturb(params, gradient(params, batch))
        point = moved(params, {k: rho * v[k] for k in v})
        g_s = gradient(point, batch)
        if approximate:
            along = {k: g_s[k] ** 2 * v[k] for k in v}
        else:
            h = hessian(point, batch)
            along = {k: sum(np.tensordot(h[k][j], v[j], v[j].ndim) for j in v) for k in v}
        params = base.step(params, g_s)
        compared = training(data, t)
        gap = losses(params, other).mean() - losses(params, compared).mean()
        slopes = gradient(params, other), gradient(params, compared)
        change = sum(np.sum((slopes[0][k] - slopes[1][k]) * -base.lr * along[k]) for k in v)
        rho = np.exp(np.log(rho) - rate * rho * gap * change)
        trajectory.append(params)
    return _stack(trajectory), np.array(radii)


# ---- Ascents along another gradient than the raw one, and lengths that depend on its norm.


def centralized_ball(rho, scaled=(), raw=True):
    """GCSAM's; leaves in `scaled` move by w², and their norm is that of |w| g."""

    def perturb(params, g):
        t = scales_of(params, 0.0, scaled)
        central = {k: x - x.mean(0) if x.ndim > 1 else x for k, x in g.items()}
        measured = g if raw else central
        length = global_norm({k: t[k] * measured[k] for k in g})
        return {k: rho * t[k] ** 2 * central[k] / length for k in g}

    return perturb


def z_score_ball(rho, quantile, norm):
    def perturb(params, g):
        kept = dict(g)
        for k, x in g.items():
            if x.ndim > 1:
                z = np.abs(x - x.mean()) / x.std(ddof=1)
                outliers = x * (z > np.quantile(z, quantile))
                kept[k] = outliers if outliers.any() else x
        if norm == "global":
            return {k: rho * x / global_norm(kept) for k, x in kept.items()}
        whole = {k: kept[k] is g[k] for k in g}
        lengths = {k: global_norm(g if whole[k] else {k: kept[k]}) for k in g}
        return {k: rho * kept[k] / lengths[k] for k in g}

    return perturb


def loss_rise_ball(sigma, rho_max, is_adaptive=False):
    """LE-SAM's; the adaptive one multiplies the gradient by |w| once."""

    def perturb(params, g):
        g = {k: np.abs(params[k]) * g[k] if is_adaptive else g[k] for k in g}
        n = np.sqrt(inner(g, g) + 1e-12)
        return {k: min(sigma / n, rho_max) * g[k] / n for k in g}

    return perturb


def partly_normalized_step(rho, lam, eta=None, scaled=()):
    def perturb(params, g):
        t = scales_of(params, eta, scaled)
        n = global_norm({k: t[k] * g[k] for k in g})
        return {k: rho * (1 - lam + lam / n) * t[k] ** 2 * g[k] for k in g}

    return perturb


def gradient_matching_step(rho, alpha, scaled=()):
    def perturb(params, g):
        t = scales_of(params, 0.0, scaled)
        n = global_norm({k: t[k] * g[k] for k in g})
        return {k: (rho / n - alpha) * t[k] ** 2 * g[k] for k in g}

    return perturb


def spectral_ball(rho, norm="leaf", vectors="l2"):
    def corner(x):
        if x.ndim > 1:
            u, _, v = np.linalg.svd(x, full_matrices=False)
            return u @ v
        return {"l2": x / np.linalg.norm(x), "sign": np.sign(x), "zero": 0 * x}[vectors]

    def perturb(params, g):
        corners = {k: corner(x) for k, x in g.items()}
        length = global_norm(corners) if norm == "global" else 1.0
        return {k: rho * x / length for k, x in corners.items()}

    return perturb


def minus_gradient(alpha):
    """LE-SAM's combination."""

    def combine(t, g, look):
        g_s = look()
        return {k: g_s[k] - alpha * g[k] for k in g}

    return combine


def on_unit(alpha):
    """GNP's combination in its authors' code: the clean gradient in length 1."""

    def combine(t, g, look):
        g_s = look()
        return {k: (1 - alpha) * g[k] / global_norm(g) + alpha * g_s[k] for k in g}

    return combine


def train_eigen_sam(
    base, rho, alpha, every, iterations, start, steps, before_refresh="sam", steps_per_epoch=None
):
    """Train with Eigen-SAM and the whole Hessian; also return the vector after every step."""
    data, params = _start()
    gradient, trajectory, vectors, v = _gradient(problem.losses_fn), [], [], None

    @jax.jit
    def hessian(params, batch):
        return jax.hessian(lambda p: problem.losses_fn(p, batch).mean())(params)

    for t in range(steps):
        batch = problem.batch_at(data, t)
        g = gradient(params, batch)
        count = t % steps_per_epoch if steps_per_epoch else t
        if count > 0 and count % every == 0:
            v, h = start if v is None else v, hessian(params, batch)
            for _ in range(iterations):
                v = {k: sum(np.tensordot(h[k][j], v[j], v[j].ndim) for j in v) for k in v}
                v = {k: x / global_norm(v) for k, x in v.items()}
        u = {k: x / global_norm(g) for k, x in g.items()}
        if v is not None:
            bend, along = alpha * np.sign(inner(g, v)), inner(u, v)
            eps = {k: rho * (u[k] + bend * (v[k] - along * u[k])) for k in g}
        else:
            eps = {k: rho * x for k, x in (u if before_refresh == "sam" else g).items()}
        params = base.step(params, gradient(moved(params, eps), batch))
        trajectory.append(params)
        vectors.append(v or {k: np.zeros_like(x) for k, x in g.items()})
    return _stack(trajectory), _stack(vectors)


# ---- Noise. `draws[name][t, j]` are standard normal numbers of step t and microbatch j.


def filter_norms(params, is_rms=False):
    """The norm of each column of a matrix, and of each whole vector."""
    norms = {k: np.linalg.norm(w, axis=0 if w.ndim > 1 else None) for k, w in params.items()}
    return {k: n / np.sqrt(len(params[k])) if is_rms else n for k, n in norms.items()}


def gaussian(sigma, scales=lambda params: dict.fromkeys(params, 1.0)):
    """Noise of these deviations; `sigma` may be a list with one number per step."""

    def noise(t, params, n):
        size, scale = sigma[t] if isinstance(sigma, list) else sigma, scales(params)
        return {k: size * scale[k] * n[k] for k in params}

    return noise


def sphere(rho, scales=lambda params: dict.fromkeys(params, 1.0)):
    def noise(t, params, n):
        length, scale = global_norm(n), scales(params)
        return {k: rho * scale[k] * n[k] / length for k in params}

    return noise


def drawn_at(draws, t, j=0):
    return {k: x[t, j] for k, x in draws.items()}


def lpf_sgd(noise, draws, num_microbatches):
    def noisy_gradient(t, params, batch, index, losses, gradient):
        total = dict.fromkeys(params, 0.0)
        for j in range(num_microbatches):
            part = rows_of(batch, range(j, len(index), num_microbatches))
            g = gradient(moved(params, noise(t, params, drawn_at(draws, t, j))), part)
            total = {k: total[k] + g[k] / num_microbatches for k in g}
        return total

    return noisy_gradient


def rwp(noise, draws, alpha):
    """RWP; `alpha` may be a list with one number per step."""

    def mixed_gradient(t, params, batch, index, losses, gradient):
        even, odd = (rows_of(batch, range(i, len(index), 2)) for i in range(2))
        g, share = gradient(params, even), alpha[t] if isinstance(alpha, list) else alpha
        h = gradient(moved(params, noise(t, params, drawn_at(draws, t))), odd)
        return {k: (1 - share) * g[k] + share * h[k] for k in g}

    return mixed_gradient


class ARWP:
    """ARWP, and m-ARWP if `lam` is given; all numbers are lists with one per step."""

    def __init__(self, draws, sigma, eta, beta, lam=None):
        self.draws, self.sigma, self.eta, self.beta, self.lam = draws, sigma, eta, beta, lam
        self.fisher, self.seen = None, []

    def __call__(self, t, params, batch, index, losses, gradient):
        fisher = self.fisher or {k: np.zeros_like(w) for k, w in params.items()}
        sums = {k: f.sum(0) if f.ndim > 1 else f for k, f in fisher.items()}
        scale, n = filter_norms(params), drawn_at(self.draws, t)
        eps = {
            k: self.sigma[t] * scale[k] * n[k] / np.sqrt(1 + self.eta[t] * sums[k]) for k in params
        }
        noisy = batch if self.lam is None else rows_of(batch, range(1, len(index), 2))
        h = gradient(moved(params, eps), noisy)
        self.fisher = {k: self.beta[t] * fisher[k] + h[k] ** 2 for k in h}
        self.seen.append(self.fisher)
        if self.lam is None:
            return h
        g = gradient(params, rows_of(batch, range(0, len(index), 2)))
        return {k: (1 - self.lam[t]) * g[k] + self.lam[t] * h[k] for k in g}


def train_bsam(
    draws,
    lr,
    rho,
    steps,
    num_microbatches,
    *,
    num_examples=64.0,
    prior=0.64,
    b1=0.9,
    b2=0.999,
    damping=0.1,
    start=1.0,
    losses_fn=problem.losses_fn,
):
    """Train with bSAM; also return the precision. `lr` and `rho` may be functions of the step."""
    data, w = _start()
    gradient, trajectory, precisions = _gradient(losses_fn), [], []
    m = {k: np.zeros_like(x) for k, x in w.items()}
    s = {k: np.full_like(x, start) for k, x in w.items()}
    delta = prior / num_examples
    for t in range(steps):
        batch = problem.batch_at(data, t)
        a, h = dict.fromkeys(w, 0.0), dict.fromkeys(w, 0.0)
        for j in range(num_microbatches):
            part = rows_of(batch, range(j, len(batch["y"]), num_microbatches))
            n = drawn_at(draws, t, j)
            g = gradient({k: w[k] + n[k] / np.sqrt(num_examples * s[k]) for k in w}, part)
            radius = rho(t) if callable(rho) else rho
            g_s = gradient({k: w[k] + radius * g[k] / s[k] for k in w}, part)
            a = {k: a[k] + np.sqrt(s[k]) * np.abs(g[k]) / num_microbatches for k in w}
            h = {k: h[k] + g_s[k] / num_microbatches for k in w}
        m = {k: b1 * m[k] + (1 - b1) * (h[k] + delta * w[k]) for k in w}
        rate = lr(t) if callable(lr) else lr
        w = {k: w[k] - rate * m[k] / s[k] for k in w}
        s = {k: b2 * s[k] + (1 - b2) * (a[k] + damping + delta) for k in w}
        trajectory.append(w)
        precisions.append(s)
    return _stack(trajectory), _stack(precisions)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class EarlierLogits:
    """SAF's teacher: what was said of an example `lag` epochs ago, by a ring of `lag + 1` epochs.

    If nothing was, what was said `lag + 1` epochs before that; in the end zeros.
    """

    gradients = 1

    def __init__(self, lag):
        self.lag, self.said = lag, {}

    def teach(self, t, epoch, rows, z, params, x):
        size = self.lag + 1
        found = [self.said.get(((epoch - self.lag) % size, i), np.zeros(3)) for i in rows]
        self.said |= {(epoch % size, i): z[j] for j, i in enumerate(rows)}
        return np.stack(found)


class AveragedWeights:
    """MESA's teacher: the moving average of the weights, moved after each step."""

    gradients = 4 / 3

    def __init__(self, decay, temper=1.0):
        self.decay, self.temper, self.average = decay, temper, None

    def teach(self, t, epoch, rows, z, params, x):
        if t > 0:
            self.average = {
                k: self.decay * self.average[k] + (1 - self.decay) * params[k] for k in params
            }
        else:
            self.average = params
        return self.temper * forward(self.average, x)[1]


def forward(params, x):
    h = np.tanh(x @ params["W1"] + params["b1"])
    return h, h @ params["W2"] + params["b2"]


def train_with_teacher(base, teacher, rows_of, steps, window, lam, temperature, weights=None):
    """Train on examples `rows_of(t)` with the backward pass by hand; 4 steps are an epoch.

    `window(epoch)` says whether the teacher counts. Also returns, of every step, the loss, the
    teacher's term and the gradients spent.
    """
    data, params = _start()
    trajectory, readings, spent = [], [], 0
    for t in range(steps):
        rows, epoch = np.asarray(rows_of(t)), t // 4
        x, y = np.asarray(data["x"])[rows], np.asarray(data["y"])[rows]
        share = np.ones(len(rows)) if weights is None else np.asarray(weights, float)
        share = share / share.sum()
        h, z = forward(params, x)
        real = share > 0
        said = np.zeros_like(z)
        said[real] = teacher.teach(t, epoch, rows[real], z[real], params, x[real])
        p, q = softmax(said / temperature), softmax(z / temperature)
        factor = (lam(t) if callable(lam) else lam) * window(epoch)
        wrong = softmax(z) - np.eye(3)[y] + factor * temperature * (q - p)
        d_z = share[:, None] * wrong
        d_h = d_z @ params["W2"].T * (1 - h**2)
        grads = {"W1": x.T @ d_h, "b1": d_h.sum(0), "W2": h.T @ d_z, "b2": d_z.sum(0)}
        loss = -(share * np.log(softmax(z)[np.arange(len(y)), y])).sum()
        term = factor * temperature**2 * (share * (p * np.log(p / q)).sum(1)).sum()
        spent += teacher.gradients if window(epoch) else 1
        readings.append((loss, term, global_norm(grads), spent))
        params = base.step(params, grads)
        trajectory.append(params)
    return _stack(trajectory), np.array(readings)
