"""What `python -m sandbox attack` runs: hostile code, the arena that it meets, and what it must not reach or leave."""
