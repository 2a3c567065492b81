"""Model families of Hugging Face: config.json, read and written; tensor names; and where a model is found."""
