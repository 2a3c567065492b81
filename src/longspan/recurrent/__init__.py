"""Recurrent layers: what a sequence's state is, and how it is computed in chunks."""
