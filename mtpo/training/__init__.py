"""Trainers for the losses of `mtpo.losses`."""
