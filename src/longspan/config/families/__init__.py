"""Model families of Hugging Face: config.json in and out, tensor names, and where a model is found."""
