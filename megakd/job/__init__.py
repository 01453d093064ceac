"""What follows from a configuration and is worked out once: for trainers and planners alike. Imports no torch."""
