"""Beside the harness: two checkouts in turns, growth, and what is known of GPU code without a GPU."""
