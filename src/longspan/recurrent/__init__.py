"""The computation of recurrent layers, in chunks, on one span of tokens, without any communication."""
