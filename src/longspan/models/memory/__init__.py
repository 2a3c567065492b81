"""Ways to save memory inside a model: recomputing, tiles, offloading."""
