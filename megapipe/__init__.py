"""megapipe pretrains GPT models under tensor, pipeline and data parallelism.

Importing this package imports nothing heavy: torch arrives with the module that needs it.
"""

__version__ = "0.1.0"
