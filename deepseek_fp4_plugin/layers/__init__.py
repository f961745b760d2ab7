"""The building blocks of the model. A layer can be called in a test with six lines."""
