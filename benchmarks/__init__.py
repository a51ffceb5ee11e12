"""Ratios against named peers, each with one command."""
