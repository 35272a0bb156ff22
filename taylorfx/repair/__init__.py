"""Repair: make up for what a cut takes away, without training."""

from taylorfx.repair.batches import Batches, Repair
from taylorfx.repair.biases import Means, compensate, means
from taylorfx.repair.least_squares import reconstruct
from taylorfx.repair.norms import recalibrate
from taylorfx.repair.regression import LeastSquares

__all__ = ["Batches", "LeastSquares", "Means", "Repair", "compensate", "means", "recalibrate", "reconstruct"]
