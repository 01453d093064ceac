"""Teacher caches: what a teacher says of a data set, computed once and read by any number of runs."""
