"""Sentencepiece models as tokenizers of the `tokenizers` library, with the same ids."""
