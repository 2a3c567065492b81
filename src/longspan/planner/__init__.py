"""What a run will need, before it runs: read from the config and one step that computes nothing."""
