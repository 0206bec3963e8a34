"""Policies decide on which steps the sharp gradient is computed (the sharp steps)."""

from samx.policies.clock import between, every, join_policies, random
from samx.policies.norms import squared_norm
from samx.policies.policy import Policy
from samx.policies.quota import quota

__all__ = ["Policy", "between", "every", "join_policies", "quota", "random", "squared_norm"]
