"""A rollout schedule on paper: the scheduler of production, driven by modelled engines instead of real ones. Pure."""
