"""Job scripts and the Slurm commands that take them."""
