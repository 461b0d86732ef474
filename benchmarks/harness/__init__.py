"""What every benchmark shares: candidates, the clocks of a CPU and a GPU, limits of a machine, bars and results."""
