"""What is trained and how: TrainConfig (each key is declared once), TransformerConfig, Megatron's flags."""
