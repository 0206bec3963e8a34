"""Scripts that answer questions about samx by running it; README.md lists them by question."""

import os

# Scripts train on all cores. LAPACK's own threads would wait for each other, see `spectral_ball`.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read once, when scipy is imported
