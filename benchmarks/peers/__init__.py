"""What other libraries offer in the place of lowbit: one file for each library, its CPU and its GPU side."""
