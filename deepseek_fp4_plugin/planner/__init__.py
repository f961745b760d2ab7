"""Before a machine is rented: what fits on it, how fast it could be, and how it should be cut."""
