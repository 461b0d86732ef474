"""What a compressed model is worth: how good it is (:mod:`lowbit.quality.evaluate`)."""
