"""Text in and out: tokenizers, chat templates, incremental detokenising. Imports nothing above it."""
