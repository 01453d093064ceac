"""What a run achieved, told to a person."""
