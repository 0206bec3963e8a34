"""What all other packages of samx use: checked transformations, closures, devices, the sharp step.

This package imports no other package of samx.
"""
