"""Token files, the samples cut from them, and the batches every rank reads."""
