"""longspan inside other people's code: one module each, imported by name so that `import longspan` needs none of them."""
