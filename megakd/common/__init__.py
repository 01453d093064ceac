"""Small pieces every package may use: errors for the reader, rank-aware logging."""
