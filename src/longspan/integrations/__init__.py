"""longspan inside other libraries: one module for each, which `import longspan` does not import."""
