"""What is wrong with a checkpoint, what that does in which runtime, and its repair."""
