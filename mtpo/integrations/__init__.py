"""Trainers of other libraries that take our rows."""
