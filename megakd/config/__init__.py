"""The configuration: what may be written, how it is read, which combinations make sense. Imports no torch."""
