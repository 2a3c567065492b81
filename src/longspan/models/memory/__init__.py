"""What saves memory inside a model: recomputing, tiles, offloading."""
