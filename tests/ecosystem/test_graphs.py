"""Graphs of different sizes: the mean over labelled nodes, of one padded graph or graph by graph.

By hand: each graph on its own, without padding, with a dense adjacency matrix.
"""

import hand
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samx

pytestmark = pytest.mark.usefixtures("float64")

RHO, LAM, CLASSES = 0.3, 0.2, 3
SGD = optax.sgd(0.1, momentum=0.9)
# For each graph the number of nodes, edges as pairs of sender and receiver, and labelled nodes.
GRAPHS = [
    (4, [(0, 1), (1, 2), (2, 3), (3, 0), (0, 2)], [0, 1, 3]),
    (2, [(0, 1)], [1]),
    (3, [(0, 1), (0, 2)], []),
]
MOST_NODES, MOST_EDGES = 4, 5


def batches():
    """Return two batches, in each `(features, labels)` of all three graphs."""
    rng = np.random.RandomState(0)
    return [
        [(rng.randn(n, 5), rng.randint(CLASSES, size=n)) for n, _, _ in GRAPHS] for _ in range(2)
    ]


def start():
    rng = np.random.RandomState(1)
    params = {"in": rng.randn(5, 4), "out": rng.randn(4, CLASSES)}
    return jax.tree.map(jnp.asarray, params)


# ---- By hand.


def dense(w, batch):
    total, count = 0.0, 0
    for (n, edges, labelled), (x, y) in zip(GRAPHS, batch, strict=True):
        adjacency = np.eye(n)
        for sender, receiver in edges:
            adjacency[receiver, sender] += 1
        logits = adjacency @ jnp.tanh(adjacency @ x @ w["in"]) @ w["out"]
        for node in labelled:
            total += jax.nn.logsumexp(logits[node]) - logits[node, y[node]]
            count += 1
    return total / count


gradient = jax.jit(jax.grad(dense))


def one_pass(w, statistics, batch):
    return gradient(w, batch), statistics


# ---- With samx: padded.


def pad(x, size):
    return np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])


def stacked(batch):
    """Pad each graph, and stack them: every leaf has one row per graph."""
    padded = []
    for (_, edges, labelled), (x, y) in zip(GRAPHS, batch, strict=True):
        edges = np.array(edges)
        padded.append(
            {
                "x": pad(x, MOST_NODES),
                "y": pad(y, MOST_NODES),
                "edges": pad(edges, MOST_EDGES),
                "is_edge": np.arange(MOST_EDGES) < len(edges),
                "is_labelled": np.isin(np.arange(MOST_NODES), labelled),
            }
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded)


def together(graphs):
    """Make one graph of all padded graphs, whose parts are not connected."""
    first = MOST_NODES * jnp.arange(len(GRAPHS))[:, None, None]
    graphs = graphs | {"edges": graphs["edges"] + first}
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), graphs)


def node_losses(w, graph):
    """Return the loss of every node of a graph, [N]."""

    def propagate(x):
        sent = x[graph["edges"][:, 0]] * graph["is_edge"][:, None]
        return x + jax.ops.segment_sum(sent, graph["edges"][:, 1], len(x))

    logits = propagate(jnp.tanh(propagate(graph["x"]) @ w["in"])) @ w["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, graph["y"])


def value_fn(w, graph):
    return (node_losses(w, graph) * graph["is_labelled"]).sum() / graph["is_labelled"].sum()


def losses_fn(w, graphs):
    """Return the mean loss of the labelled nodes of each graph, [B]; 0 where none is labelled."""
    losses = jax.vmap(node_losses, in_axes=(None, 0))(w, graphs) * graphs["is_labelled"]
    return losses.sum(1) / jnp.maximum(graphs["is_labelled"].sum(1), 1)


def of_the_whole(graphs):
    return {"value_fn": lambda w: value_fn(w, together(graphs))}


def of_each_graph(graphs):
    weights = graphs["is_labelled"].sum(1)
    return {"losses_fn": losses_fn, "batch": graphs, "weights": weights}


SAM = optax.chain(samx.sam(RHO), SGD)
STEPS = {
    "sam, value_fn": (lambda: SAM, of_the_whole, hand.sam),
    "sam, losses_fn": (lambda: SAM, of_each_graph, hand.sam),
    "accumulate, a graph at a time": (lambda: samx.accumulate(SAM, 3), of_each_graph, hand.sam),
    "sampa": (
        lambda: samx.sampa(SGD, RHO, LAM, batch_like=stacked(batches()[0])),
        of_each_graph,
        lambda one_pass, base, rho, *args: hand.sampa(one_pass, base, rho, LAM, *args),
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_mean_over_labelled_nodes(name):
    build, closures_of, train_by_hand = STEPS[name]
    tx, w = build(), start()
    state = tx.init(w)

    @jax.jit
    def step(w, state, graphs):
        g = jax.grad(value_fn)(w, together(graphs))
        updates, state = tx.update(g, state, w, **closures_of(graphs))
        return optax.apply_updates(w, updates), state

    found = []
    for batch in batches():
        w, state = step(w, state, stacked(batch))
        found.append(w)
    expected = train_by_hand(one_pass, SGD, RHO, start(), None, batches())
    hand.assert_same(found, [w for w, _ in expected])


def test_both_closures_are_the_same_objective():
    graphs = stacked(batches()[0])
    closures = of_the_whole(graphs) | of_each_graph(graphs)
    tx, w = samx.sam(RHO), start()

    @jax.jit
    def step(keywords):
        value_fn = closures["value_fn"]
        keywords = {"value_fn": value_fn, "losses_fn": losses_fn, **keywords}
        return tx.update(jax.grad(value_fn)(w), tx.init(w), w, **keywords)

    def report(**keywords):
        arrays = {name: x for name, x in keywords.items() if not callable(x)}
        return samx.preflight(step, arrays)

    assert report(**closures) == []
    (line,) = report(**closures | {"weights": None})
    assert "they must be the same objective" in line
