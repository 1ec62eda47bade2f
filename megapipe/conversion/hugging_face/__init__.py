"""Directories of Hugging Face's: config.json, safetensors files with an index, a tokenizer."""
