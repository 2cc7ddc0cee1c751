"""Text in, tokens on disk, tokens out: readers, tokenizers, token stores, batches. The only door to Arrow."""
