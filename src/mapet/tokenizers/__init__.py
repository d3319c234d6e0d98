"""Visual tokenizers: images in, one id per patch out."""
