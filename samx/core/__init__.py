"""What every other room builds on: the contract's boundary, closures, devices, the sharp step.

Nothing here imports another room of samx.
"""
