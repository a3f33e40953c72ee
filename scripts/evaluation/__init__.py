"""What a model is worth, on which texts it fails, and where the evidence stands."""
