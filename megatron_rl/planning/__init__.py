"""Plans on paper: what a model needs at a layout, before anything is allocated. Pure arithmetic."""
