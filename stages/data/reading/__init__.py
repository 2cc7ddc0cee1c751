"""Text as people have it, in files of many formats, read one document at a time."""
