"""Pure tensor functions: advantages, importance-ratio corrections, losses, aggregation. Needs torch alone."""
