"""Hypothesis profiles: the default for every day, HYPOTHESIS_PROFILE=deep for the thousand."""

import os

import torch
from hypothesis import HealthCheck, settings

quiet = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("default", max_examples=40, derandomize=True, **quiet)
settings.register_profile("deep", max_examples=1000, **quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

torch.set_num_threads(1)  # the tests run side by side; tiny tensors gain nothing from more
