"""What a unit is worth: derivatives of the loss by gates, and criteria of them."""
