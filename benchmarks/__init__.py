"""What is measured: commands (``python -m benchmarks.NAME``), and the harness, peers and cases that they share."""
