"""timm Vision Transformers with rectangular attention masks, and their files."""
