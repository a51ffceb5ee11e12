"""Problems, the trajectory journal, and labels."""
