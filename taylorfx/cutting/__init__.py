"""The going: plans, and what they take out of trees."""
