"""The data path: text to batches, the same in every layout. Read the files in this order:

formats (raw rows), rows (judged), sources, blocks (dealt and shuffled), streams (tokenised),
blend, packing, feed (one data rank), distribute (one replica).
"""

from megapipe.data.feed import Batch, BatchFeed, merge_states
from megapipe.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

__all__ = ["Batch", "BatchFeed", "Tokenizer", "check_vocabulary", "load_tokenizer", "merge_states"]
