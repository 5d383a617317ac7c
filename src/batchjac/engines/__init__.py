"""Ways to compute the rows of a Jacobian from a recorded forward."""
