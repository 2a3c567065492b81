"""Recurrent layers' computation on one span of tokens, without any communication."""
