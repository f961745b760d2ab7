"""How r1_nano, the small model inside the package, was made: data, model, training, export. Not part of the wheel."""
