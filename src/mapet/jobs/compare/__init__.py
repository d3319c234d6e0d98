"""Several objectives and tokenizers in one setting, and what each is worth."""
