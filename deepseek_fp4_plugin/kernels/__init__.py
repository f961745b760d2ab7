"""Fast arithmetic behind one contract. Layers import `ops`; `select` alone knows the backends."""
