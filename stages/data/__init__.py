"""Text in, tokens on disk, tokens out: readers of corpora, Arrow token stores, batches. The only door to Arrow."""
