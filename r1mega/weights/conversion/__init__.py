"""Between Hugging Face folders and checkpoints: streamed, resumable, read back."""
