"""The application: what the commands do, without their options and without their tables."""
