"""Scripts that answer questions about samx by running it; README.md lists them by question."""
