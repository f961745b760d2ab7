"""What the bits mean: exact, slow, plain torch. Everything fast elsewhere is compared with these functions."""
