"""What is trained and how: TrainConfig (every key once), TransformerConfig, Megatron's flags."""
