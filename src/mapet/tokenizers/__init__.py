"""Visual tokenizers: images in, one id per patch out."""

from mapet.tokenizers.base import Grid, KTokenizer, Tokenizer, hash_content
from mapet.tokenizers.dvae import DVAE
from mapet.tokenizers.files import CONFIG_FILE, PUBLISHED, TOKENIZERS, holds_tokenizer, load_tokenizer, save_tokenizer
from mapet.tokenizers.kfeatures import KFeatures, features_on_grid
from mapet.tokenizers.kmeans import all_cores
from mapet.tokenizers.kpixels import KPixels
from mapet.tokenizers.teachers import Teacher, build_teacher, library_of
from mapet.tokenizers.vqkd import VQKD

__all__ = [
    "CONFIG_FILE",
    "DVAE",
    "PUBLISHED",
    "TOKENIZERS",
    "VQKD",
    "Grid",
    "KFeatures",
    "KPixels",
    "KTokenizer",
    "Teacher",
    "Tokenizer",
    "all_cores",
    "build_teacher",
    "features_on_grid",
    "hash_content",
    "holds_tokenizer",
    "library_of",
    "load_tokenizer",
    "save_tokenizer",
]
