"""What a run will need and cost on a cluster that need not be there: memory, traffic, time. Builds nothing."""
