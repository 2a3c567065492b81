"""The backends of attention: one protocol, several kernels, and the choice between them."""
