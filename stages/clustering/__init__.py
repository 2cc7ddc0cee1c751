"""Document vectors, k-means over them, and routing by them. Arithmetic on arrays: no files, no neural network."""
