"""From a corpus to batches: readers, filters, deduplication, document order, tokens, shards and the loader."""
