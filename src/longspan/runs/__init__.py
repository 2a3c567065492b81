"""The application: what the commands do, except for parsing options and printing tables."""
