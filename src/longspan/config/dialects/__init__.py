"""The vocabularies of Megatron-LM and axolotl: how names that are not keys of longspan are handled."""
