"""Training: algorithms, the data they train on, and the loop that drives them."""
