"""What Keras needs of the package: strict loading, serialization, the tree of layers, compiling."""
