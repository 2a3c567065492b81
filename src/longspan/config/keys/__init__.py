"""The keys of a config, a file for each group of them."""
