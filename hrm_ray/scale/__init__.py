"""How long training takes on how many workers, and what it costs: arithmetic from few numbers (docs/scale.md)."""
