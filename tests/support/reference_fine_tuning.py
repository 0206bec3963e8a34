"""Independent references of the variants for fine-tuning: weights seen through a map, logits apart.

As in reference.py: plain loops, without code of samx or optax. Backward passes are by hand.
"""

import jax
import numpy as np
import problem
import reference


def backward(params, x, dz):
    """Return the gradients at all parameters, given those at the logits [B, 3]."""
    hidden, _ = reference.forward(params, x)
    dh = dz @ params["W2"].T * (1 - hidden**2)
    return {"W1": x.T @ dh, "b1": dh.sum(0), "W2": hidden.T @ dz, "b2": dz.sum(0)}


def at_logits(params, batch, weights):
    """Return the gradient of the weighted mean loss at the logits, and the features."""
    hidden, z = reference.forward(params, batch["x"])
    dz = reference.softmax(z) - np.eye(z.shape[1])[batch["y"]]
    return dz * (weights / weights.sum())[:, None], hidden


def functional_sam(perturb):
    def combine(params, batch, weights):
        dz, _ = at_logits(params, batch, weights)
        eps = perturb(params, backward(params, batch["x"], dz))
        return backward(reference.moved(params, eps), batch["x"], dz)

    return combine


def logits_sam(rho, is_adaptive=False):
    def combine(params, batch, weights):
        dz, hidden = at_logits(params, batch, weights)
        g = hidden.T @ dz * (np.abs(params["W2"]) if is_adaptive else 1)
        moved = params | {"W2": params["W2"] + rho * g / (np.linalg.norm(g) + 1e-12)}
        return backward(moved, batch["x"], at_logits(moved, batch, weights)[0])

    return combine


def train(combine, base, steps, weights=None):
    """Train on whole batches; `combine` is `(params, batch, weights) -> gradient`."""
    data, params = problem.make()
    params = {k: np.asarray(w) for k, w in params.items()}
    given, trajectory = np.ones(problem.BATCH_SIZE) if weights is None else weights, []
    for t in range(steps):
        batch = jax.tree.map(np.asarray, problem.batch_at(data, t))
        params = base.step(params, combine(params, batch, given))
        trajectory.append(params)
    return {k: np.stack([w[k] for w in trajectory]) for k in params}


# ---- Low-rank adapters: weights W + A B of both matrices, everything else frozen.


def adapters(rank=2):
    """Return adapters as one flat tree; B is not zero, so that A matters from the first step."""
    rng, found = np.random.RandomState(5), {}
    for name, (rows, columns) in {"W1": (10, 16), "W2": (16, 3)}.items():
        found[f"{name}/lora_a"] = rng.randn(rows, rank) / rows**0.5
        found[f"{name}/lora_b"] = 0.2 * rng.randn(rank, columns)
    return found


def merged(flat, params):
    """Return the weights: the two matrices alone."""
    return {k: params[k] + flat[f"{k}/lora_a"] @ flat[f"{k}/lora_b"] for k in ("W1", "W2")}


def pulled(flat, g):
    """Return the gradient at the adapters, given that at the weights."""
    a = {f"{k}/lora_a": x @ flat[f"{k}/lora_b"].T for k, x in g.items()}
    return a | {f"{k}/lora_b": flat[f"{k}/lora_a"].T @ x for k, x in g.items()}


def gradient_at(weights, params, batch):
    """Return the gradient at the two matrices, and the loss's other leaves frozen."""
    whole = params | weights
    dz, _ = at_logits(whole, batch, np.ones(len(batch["y"])))
    g = backward(whole, batch["x"], dz)
    return {k: g[k] for k in weights}


def train_adapters(rule, base, steps):
    """Train adapters; `rule` is `(t, weights, gradient) -> gradient at the weights`."""
    data, params = problem.make()
    params, flat = {k: np.asarray(w) for k, w in params.items()}, adapters()
    trajectory = []
    for t in range(steps):
        batch = jax.tree.map(np.asarray, problem.batch_at(data, t))
        u = rule(t, merged(flat, params), lambda W, batch=batch: gradient_at(W, params, batch))
        flat = base.step(flat, pulled(flat, u))
        trajectory.append(flat)
    return {k: np.stack([w[k] for w in trajectory]) for k in flat}


def train_whole(rule, base, steps):
    """Train the parameters themselves; `rule` as in `train_adapters`."""

    def combine(t, params, batch):
        def gradient(w):
            return backward(w, batch["x"], at_logits(w, batch, np.ones(len(batch["y"])))[0])

        return rule(t, params, gradient)

    clock = iter(range(steps))
    return train(lambda params, batch, _: combine(next(clock), params, batch), base, steps)


def sam_on_weights(rho):
    def rule(t, weights, gradient):
        return gradient(reference.moved(weights, reference.ball(rho)(weights, gradient(weights))))

    return rule


def flat_lora(rho, num_steps, draws):
    """`rho` is a number or a list with one per step; `draws` standard normal, [steps, ...]."""

    def rule(t, weights, gradient):
        radius = rho[t] if isinstance(rho, list) else rho
        factor = (1 - np.cos(np.pi * min(t / num_steps, 1))) / 2
        eps = {}
        for k, w in weights.items():
            if w.ndim == 2:
                lengths = np.sqrt((w**2).sum(axis=0)) / np.sqrt(w.shape[0])
                eps[k] = factor * radius * lengths[None] * draws[k][t]
            else:
                eps[k] = np.zeros_like(w)
        return gradient(reference.moved(weights, eps))

    return rule


class BiLoRA:
    """A second pair per matrix, which climbs; `ascent` has `step(flat tree, gradients)`."""

    def __init__(self, rho, first_a, ascent, columns):
        self.rho, self.ascent = rho, ascent
        self.a = dict(first_a)
        self.b = {k: np.zeros((a.shape[1], columns[k])) for k, a in first_a.items()}

    def __call__(self, t, weights, gradient):
        radius = self.rho[t] if isinstance(self.rho, list) else self.rho
        length = np.sqrt(sum(((self.a[k] @ self.b[k]) ** 2).sum() for k in self.a))
        shrink = min(1.0, radius / length) if length > 0 else 1.0
        if shrink > 0:
            self.a = {k: a * np.sqrt(shrink) for k, a in self.a.items()}
            self.b = {k: b * np.sqrt(shrink) for k, b in self.b.items()}
        eps = {
            k: self.a[k] @ self.b[k] * (shrink > 0) if k in self.a else np.zeros_like(w)
            for k, w in weights.items()
        }
        g = gradient(reference.moved(weights, eps))
        down = {f"{k}/a": -g[k] @ self.b[k].T for k in self.a}
        down |= {f"{k}/b": -self.a[k].T @ g[k] for k in self.a}
        pairs = {f"{k}/a": a for k, a in self.a.items()} | {f"{k}/b": b for k, b in self.b.items()}
        pairs = self.ascent.step(pairs, down)
        self.a = {k: pairs[f"{k}/a"] for k in self.a}
        self.b = {k: pairs[f"{k}/b"] for k in self.b}
        return g
