"""What a compressed model is worth: ``evaluate`` says how good it is, ``budget`` which form each layer should have."""
