"""Hypothesis profiles: the default for every day, HYPOTHESIS_PROFILE=deep for the thousand."""

import os

import torch
from hypothesis import HealthCheck, settings

quiet = settings(deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("default", quiet, max_examples=40, derandomize=True)
settings.register_profile("deep", quiet, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

torch.set_num_threads(1)  # the tests run side by side; tiny tensors gain nothing from more
