"""The code interpreter: Jupyter kernels that run the code of a trajectory."""
