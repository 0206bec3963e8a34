"""Radii that `examples/digits.py` chose on validation data, by variant and base.

Of each pair, the first is for the share of wrong labels of that script, the second for clean
labels. `python notebooks/_pages/measured.py SUMMARY.json` writes this file from its summary.
"""

DIGITS: dict[str, dict[str, tuple[float, float]]] = {
    "adasam": {"momentum": (0.2, 0.2)},
    "ae_looksam": {"momentum": (0.2, 0.1)},
    "ae_sam": {"momentum": (0.5, 0.1)},
    "arsam": {"momentum": (0.2, 0.2)},
    "asam": {"momentum": (1.0, 0.5)},
    "async_sam": {"momentum": (0.2, 0.05)},
    "ausam": {"momentum": (0.2, 0.2)},
    "bisam": {"momentum": (0.2, 0.05)},
    "coupled_wsam": {"momentum": (0.02, 0.02)},
    "dynamic_sparse_sam": {"momentum": (0.5, 0.1)},
    "esam": {"momentum": (0.1, 0.1)},
    "fisher_sam": {"momentum": (0.2, 0.1)},
    "fisher_sparse_sam": {"momentum": (0.2, 0.5)},
    "friendly_sam": {"momentum": (0.5, 0.1)},
    "g_rst": {"momentum": (0.2, 0.2)},
    "gsam": {"momentum": (0.2, 0.05)},
    "ksam": {"momentum": (0.05, 0.2)},
    "lightsam_adagrad": {"momentum": (0.005, 0.001)},
    "lightsam_adam": {"momentum": (0.002, 0.001)},
    "lightsam_norm": {"momentum": (0.2, 0.1)},
    "look_layer_sam": {"momentum": (0.02, 0.005)},
    "looksam": {"momentum": (0.5, 0.1)},
    "momentum_sam": {"momentum": (1.0, 0.5)},
    "monge_sam": {"momentum": (0.2, 0.2)},
    "msam": {"momentum": (0.2, 0.2)},
    "periodic": {"momentum": (0.5, 0.1)},
    "rst": {"momentum": (0.5, 0.1)},
    "sam": {"momentum": (0.2, 0.2)},
    "sampa": {"momentum": (0.2, 0.2)},
    "sl_sam": {"momentum": (0.01, 0.02)},
    "stable_sam": {"momentum": (1.0, 0.2)},
    "usam": {"momentum": (0.5, 0.2)},
    "vsam": {"momentum": (0.2, 0.2)},
    "wsam": {"momentum": (0.2, 0.2)},
}
