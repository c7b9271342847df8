"""Training of the outline refiner, after that of the network."""
