"""A linear over attention output and GELU of the MLP that never puts them side by side."""
