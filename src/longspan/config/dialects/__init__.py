"""The vocabularies of Megatron-LM and axolotl: how names that are no keys here are handled."""
