"""From a module to a network: what ``torch.export`` traces, operator by operator."""
