"""Pruning within the training loops of other libraries, as their callbacks: at the end of epochs.

| loop | callback | library |
| --- | --- | --- |
| ``transformers.Trainer`` | `taylorfx.callbacks.trainer.PruneCallback` | transformers, accelerate |
| ``lightning.Trainer`` | `taylorfx.callbacks.lightning.PruneCallback` | lightning |

Each is imported by its own name, as each needs its library.
"""
